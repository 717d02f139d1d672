"""Acceptance in Triton: one program a sequence."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def kernel(chosen, tokens, pending, proposed, verdicts):
    """Counts the leading proposals that equal the base's choices."""
    s = tl.program_id(0)
    row = tl.load(pending + s)
    k = tl.load(proposed + s)
    accepted = 0
    equal = 1
    i = 0
    while i < k:
        hit = tl.load(chosen + row + i) == tl.load(tokens + row + i + 1)
        equal = equal * hit.to(tl.int32)
        accepted += equal
        i += 1
    tl.store(verdicts + 2 * s, accepted)
    tl.store(verdicts + 2 * s + 1, tl.load(chosen + row + accepted))


def launch_accept(
    *,
    chosen: Tensor,
    tokens: Tensor,
    pending: Tensor,
    proposed: Tensor,
    verdicts: Tensor,
    overlap: bool = False,
) -> None:
    """See ``accept.reference``."""
    kernel[(verdicts.shape[0],)](chosen, tokens, pending, proposed, verdicts, num_warps=1)
