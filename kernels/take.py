"""The verifier's rows of a turn, taken from device memory.

With ``take``, ``settle`` and ``follow`` draft and verifier take turns with no host between: the
verifier runs take → forward → choose → accept → settle, the draft follow → forwards.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from outrider.kernels.operation import (
    Arguments,
    Call,
    Implementation,
    Operation,
    Tools,
    always,
    no_cuda_source,
)

MAX_SEQUENCES = 64
"""Sequences of a turn at most."""
ENDED = 0xFFFFFFFF
"""The low half of a bell that says that the grant is over; ``shared/link/device/mailbox.py`` has it
too, which this package can't import."""


def reference(
    *,
    bell: Tensor,
    proposals: Tensor,
    committed: Tensor,
    pending: Tensor,
    limits: Tensor,
    ks: Tensor,
    tokens: Tensor,
    positions: Tensor,
    noise_positions: Tensor,
    row_counts: Tensor,
    proposed: Tensor,
    width: int,
    count: int,
    overlap: bool = False,
) -> None:
    """``width`` rows for each of ``count`` sequences, of which the first ``row_counts[s]`` are to
    be forwarded: the pending token and ``proposed[s]`` tokens of the draft.

    int32, contiguous, but for ``bell``, int64 [1], the draft's. Read: ``proposals`` [sequences,
    at least width - 1]: the draft's tokens, below 0 where its row was not finite; per sequence
    ``committed``: the log's length n, its last token ``pending``; ``limits``: the length at which
    the sequence ends; ``ks``: the most tokens to judge. Written: ``tokens`` and
    ``noise_positions`` [at least count * width]: the rows, and where in the log the token after
    each belongs; per sequence ``positions``: n - 1, that of the first row; ``row_counts``;
    ``proposed``. All zero where the bell says that the grant is over, and at the limit.
    """
    n, left = committed[:count], limits[:count] - committed[:count]
    goes_on = (left > 0) & ((bell & ENDED) != ENDED)
    offered = proposals[:count, : width - 1]
    finite = (offered >= 0).int().cumprod(-1).sum(-1)
    k = torch.minimum(torch.minimum(ks[:count], left - 1), finite).clamp(0, width - 1)
    fed = torch.cat((pending[:count, None], offered.clamp(min=0)), 1)
    places = n[:, None] + torch.arange(width, device=n.device, dtype=torch.int32)
    tokens[: count * width] = torch.where(goes_on[:, None], fed, 0).flatten()
    noise_positions[: count * width] = torch.where(goes_on[:, None], places, 0).flatten()
    positions[:count] = torch.where(goes_on, n - 1, 0)
    row_counts[:count] = torch.where(goes_on, k + 1, 0)
    proposed[:count] = torch.where(goes_on, k, 0)


def _cuda(tools: Tools) -> Call:
    def run(
        *,
        bell: Tensor,
        proposals: Tensor,
        committed: Tensor,
        pending: Tensor,
        limits: Tensor,
        ks: Tensor,
        tokens: Tensor,
        positions: Tensor,
        noise_positions: Tensor,
        row_counts: Tensor,
        proposed: Tensor,
        width: int,
        count: int,
        overlap: bool = False,
    ) -> None:
        kernel = tools.compiler.kernel("take", "take", {"BF16": 0}, threads=64, shared=0)
        read = (bell, proposals, committed, pending, limits, ks)
        written = (tokens, positions, noise_positions, row_counts, proposed)
        sizes = (proposals.shape[1], width, count)
        kernel.launch((1,), (*read, *written, *sizes), overlap=overlap)

    return run


def _cases(device: torch.device, dtype: torch.dtype) -> Iterator[Arguments]:
    def ints(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, device=device, dtype=torch.int32)

    for count, width in ((1, 1), (1, 5), (5, 4), (MAX_SEQUENCES, 5)):
        # Beyond the limit, at it, one before it, and all that K may meet.
        for first, turns in ((0, 7), (1, 7), (2, 7), (7, 7), (7, ENDED)):
            committed = ints(1, 1000, count)
            room = (torch.arange(count, device=device) + first) % 8 - 1
            proposals = ints(-1, 9, MAX_SEQUENCES, 6)
            proposals[::5, :3] = torch.tensor([4, -1, 4], device=device)
            yield {
                "bell": torch.tensor([3 << 32 | turns], device=device),
                "proposals": proposals,
                "committed": committed,
                "pending": ints(0, 9, count),
                "limits": (committed + room).int(),
                "ks": ints(0, 6, count),
                "tokens": ints(0, 9, count * width + 3),
                "positions": ints(0, 9, MAX_SEQUENCES),
                "noise_positions": ints(0, 9, count * width + 3),
                "row_counts": ints(0, 9, MAX_SEQUENCES),
                "proposed": ints(0, 9, MAX_SEQUENCES),
                "width": width,
                "count": count,
            }


OPERATION = Operation(
    "take",
    "the verifier's rows of a turn",
    reference,
    ("tokens", "positions", "noise_positions", "row_counts", "proposed"),
    _cases,
    {},
    (
        Implementation("cuda", no_cuda_source, _cuda),
        Implementation("torch", always, lambda tools: reference, "thirty launches instead of one"),
    ),
)
