"""From verdicts to where the sequences stand, and to what the draft goes on from.

See ``take`` for how turns are taken.
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
from outrider.kernels.take import MAX_SEQUENCES


def reference(
    *,
    verdicts: Tensor,
    committed: Tensor,
    pending: Tensor,
    row_counts: Tensor,
    limits: Tensor,
    slots: Tensor,
    count: int,
    overlap: bool = False,
) -> None:
    """Puts what was judged into the state of ``count`` sequences, and into the draft's slots.

    All int32, contiguous. Read: ``verdicts`` [at least count, 2]: (accepted, next token), the
    token below 0 where the base's row was not finite; per sequence ``row_counts``: rows forwarded,
    0 where there was nothing to judge; ``limits``: the log's length at which it ends. Read and
    written, per sequence: ``committed``: the log's length; ``pending``: its last token; both stay
    where nothing was judged or the row was not finite. Written: ``slots`` [sequences, 4]:
    (accepted, next token, the log's length, 1 where the sequence goes on).
    """
    judged = row_counts[:count] > 0
    accepted = torch.where(judged, verdicts[:count, 0], 0)
    token = torch.where(judged, verdicts[:count, 1], 0)
    grows = judged & (token >= 0)
    n = torch.where(grows, committed[:count] + accepted + 1, committed[:count])
    goes_on = grows & (n < limits[:count])
    committed[:count] = n
    pending[:count] = torch.where(grows, token, pending[:count])
    slots[:count] = torch.stack((accepted, token, n, goes_on.int()), 1)


def _cuda(tools: Tools) -> Call:
    def run(
        *,
        verdicts: Tensor,
        committed: Tensor,
        pending: Tensor,
        row_counts: Tensor,
        limits: Tensor,
        slots: Tensor,
        count: int,
        overlap: bool = False,
    ) -> None:
        kernel = tools.compiler.kernel("settle", "settle", {"BF16": 0}, threads=64, shared=0)
        arguments = (verdicts, committed, pending, row_counts, limits, slots, count)
        kernel.launch((1,), arguments, overlap=overlap)

    return run


def _cases(device: torch.device, dtype: torch.dtype) -> Iterator[Arguments]:
    def ints(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, device=device, dtype=torch.int32)

    for count in (1, 5, MAX_SEQUENCES):
        for first in range(6):
            committed = ints(1, 1000, count)
            # Every length of the accepted prefix, up to what was proposed, at every distance of
            # the limit; one row in six is not finite, and one sequence in seven has no rows.
            each = torch.arange(count, device=device, dtype=torch.int32) + first
            accepted, room = each % 5, each // 5 % 4
            row_counts = torch.where(each % 7 == 6, 0, accepted + 1 + each % 2)
            token = torch.where(each % 6 == 5, -1, ints(0, 9, count))
            yield {
                "verdicts": torch.stack((accepted, token), 1),
                "committed": committed,
                "pending": ints(0, 9, count),
                "row_counts": row_counts,
                "limits": committed + accepted + 1 + room,
                "slots": ints(0, 9, MAX_SEQUENCES, 4),
                "count": count,
            }


OPERATION = Operation(
    "settle",
    "verdicts into the sequences' state",
    reference,
    ("committed", "pending", "slots"),
    _cases,
    {},
    (
        Implementation("cuda", no_cuda_source, _cuda),
        Implementation("torch", always, lambda tools: reference, "twenty launches instead of one"),
    ),
)
