"""A ragged batch as one packed row dimension: which rows are whose, and what each may read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from outrider.shared.kv.arena import Segment
from outrider.shared.kv.storage import Storage
from outrider.shared.model.attention import visibility
from outrider.shared.model.runner import Span


@dataclass(slots=True)
class PackedSpan:
    """One span in a packed batch.

    ``begin … end-1``: its rows. ``causal``: they are all that it reads. Per pool: ``writes``,
    where its rows go; ``reads``, where what it reads lies; ``masks``, which row sees what.
    """

    span: Span
    begin: int
    end: int
    causal: bool
    writes: list[list[Segment]]
    reads: list[list[Segment]]
    masks: list[Tensor | None]


def pack(storage: Storage, spans: Sequence[Span]) -> list[PackedSpan]:
    """Places spans one behind the other. What is worked out here serves every layer."""
    arena = storage.arena
    packed, begin = [], 0
    for span in spans:
        rows = len(span.tokens)
        start, end = span.start, span.start + rows
        causal = start == 0 and all(p.window is None or p.window >= rows for p in arena.pools)
        writes, reads, masks = [], [], []
        for number, pool in enumerate(arena.pools):
            first = arena.first_read(number, start)
            writes.append(arena.segments(span.extent, number, start, end))
            reads.append(arena.segments(span.extent, number, first, end))
            masks.append(
                None
                if causal
                else visibility(
                    rows,
                    start,
                    first,
                    window=pool.window,
                    dtype=storage.dtype,
                    device=storage.device,
                )
            )
        packed.append(PackedSpan(span, begin, begin + rows, causal, writes, reads, masks))
        begin += rows
    return packed
