"""A ragged batch as one packed row dimension: which rows are whose, and what each may read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from outrider.shared.attention import visibility
from outrider.shared.runner import Span
from outrider.shared.storage import Storage
from torch import Tensor


@dataclass(slots=True)
class PackedSpan:
    """One span in a packed batch: its rows ``begin … end-1``; per pool the first position it
    reads and the mask of its rows. ``causal``: its rows are all it reads."""

    span: Span
    begin: int
    end: int
    firsts: list[int]
    masks: list[Tensor | None]
    causal: bool


def pack(storage: Storage, spans: Sequence[Span]) -> list[PackedSpan]:
    """Places spans one behind the other. Masks are made once and serve every layer."""
    pools = storage.arena.pools
    packed, begin = [], 0
    for span in spans:
        rows = len(span.tokens)
        firsts = [storage.arena.first_read(i, span.start) for i in range(len(pools))]
        causal = span.start == 0 and all(p.window is None or p.window >= rows for p in pools)
        masks: list[Tensor | None] = [None] * len(pools)
        if not causal:
            masks = [
                visibility(
                    rows,
                    span.start,
                    first,
                    window=pool.window,
                    dtype=storage.dtype,
                    device=storage.device,
                )
                for pool, first in zip(pools, firsts, strict=True)
            ]
        packed.append(PackedSpan(span, begin, begin + rows, firsts, masks, causal))
        begin += rows
    return packed
