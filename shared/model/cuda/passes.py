"""Cuts a ragged batch into passes that the kernels take: at most 64 rows, a sequence once."""

from __future__ import annotations

from collections.abc import Sequence

from outrider.kernels.attention_shapes import Heads, need
from outrider.kernels.linear_shapes import MAX_ROWS
from outrider.shared.model.runner import Span

MAX_SEQUENCES = 64
# Sizes for which there are graphs; a forward takes the next one that holds it.
ROW_SIZES = (*range(1, 11), 12, 16, 17, 24, 32, 40, 48, 56, 64)
POWERS = (1, 2, 4, 8, 16, 32, 64)


def bucket(value: int, sizes: Sequence[int]) -> int:
    """The smallest size that holds ``value``."""
    return next(size for size in sizes if size >= value)


def cut_spans(
    spans: Sequence[Span], heads: Heads, work_capacity: int
) -> list[list[tuple[int, Span]]]:
    """Passes of (index of the span, its piece). Pieces of a span come in order.

    ``work_capacity``: attention's scratch memory, see ``kernels.attention_shapes.need``. A pass may
    need more only where a single piece does.
    """
    left = [(i, span, 0) for i, span in enumerate(spans)]
    passes: list[list[tuple[int, Span]]] = []
    while left:
        room, longest = MAX_ROWS, 1
        taken: list[tuple[int, Span]] = []
        rest: list[tuple[int, Span, int]] = []
        ends: list[int] = []
        for i, span, done in left:
            count = min(room, len(span.tokens) - done)
            end = span.start + done + count
            needed = need(heads, [*ends, end], bucket(max(longest, count), POWERS))
            if count == 0 or (taken and needed > work_capacity):
                rest.append((i, span, done))
                continue
            after = len(span.tokens) - done - count
            taken.append((i, span.part(done, done + count)))
            ends.append(end)
            longest, room = max(longest, count), room - count
            if after:
                rest.append((i, span, done + count))
        passes.append(taken)
        left = rest
    return passes


def rows_in_order(pieces: Sequence[tuple[int, int]]) -> list[int] | None:
    """``pieces``: (span, wanted rows) as they were forwarded. The places of all wanted rows, spans
    in order; None where they are in order already."""
    if list(pieces) == sorted(pieces, key=lambda piece: piece[0]):
        return None
    begin = 0
    own: list[tuple[int, range]] = []
    for span, count in pieces:
        own.append((span, range(begin, begin + count)))
        begin += count
    return [row for _, rows in sorted(own, key=lambda entry: entry[0]) for row in rows]
