"""Cuts a ragged batch into passes: at most ``PassLimits.rows`` rows, a sequence once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from outrider.kernels import choose, reject
from outrider.kernels.attention_shapes import Heads, need
from outrider.shared.model.runner import Span

MAX_SEQUENCES = 64
HEAD_ROWS = min(choose.MAX_COUNT, reject.MAX_COUNT)
"""Rows of a pass whose logits are made, at most: each takes a vocabulary of float32."""
GRAPH_ROWS = 512
"""Rows up to which passes are captured. Beyond, the device is busy longer than launches take."""
# Sizes for which there are graphs; a forward takes the next one that holds it.
ROW_SIZES = (
    *range(1, 11), 12, 16, 17, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320,
    384, 448, GRAPH_ROWS,
)  # fmt: skip
POWERS = tuple(1 << n for n in range(17))


@dataclass(frozen=True, slots=True)
class PassLimits:
    """What a pass may hold: ``rows``, and scratch memory of attention, see
    ``kernels.attention_shapes.need``."""

    rows: int
    work: int


def bucket(value: int, sizes: Sequence[int]) -> int:
    """The smallest size that holds ``value``."""
    return next(size for size in sizes if size >= value)


def row_size(rows: int) -> int:
    """Rows that a pass of ``rows`` rows is launched for."""
    return bucket(rows, ROW_SIZES) if rows <= GRAPH_ROWS else rows


def cut_spans(
    spans: Sequence[Span], heads: Heads, limits: PassLimits
) -> list[list[tuple[int, Span]]]:
    """Passes of (index of the span, its piece). Pieces of a span come in order.

    The wanted rows of a span stay together where a pass can hold them. A pass may need more
    scratch memory than there is only where a single piece does.
    """
    if _whole(spans, heads, limits):
        return [list(enumerate(spans))]
    left = [(i, span, 0) for i, span in enumerate(spans)]
    passes: list[list[tuple[int, Span]]] = []
    while left:
        room, head = limits.rows, HEAD_ROWS
        taken: list[tuple[int, Span]] = []
        rest: list[tuple[int, Span, int]] = []
        for i, span, done in left:
            piece = _piece(span, done, room, head, together=min(HEAD_ROWS, limits.rows))
            if (
                piece is None
                or len(taken) == MAX_SEQUENCES
                or (taken and _need(heads, [*(p for _, p in taken), piece]) > limits.work)
            ):
                rest.append((i, span, done))
                continue
            taken.append((i, piece))
            room, head = room - len(piece.tokens), head - piece.wanted
            done += len(piece.tokens)
            if done < len(span.tokens):
                rest.append((i, span, done))
        passes.append(taken)
        left = rest
    return passes


def _whole(spans: Sequence[Span], heads: Heads, limits: PassLimits) -> bool:
    """Whether one pass holds all of them, as nearly every round does."""
    return (
        0 < len(spans) <= MAX_SEQUENCES
        and sum([len(span.tokens) for span in spans]) <= limits.rows
        and sum([span.wanted for span in spans]) <= HEAD_ROWS
        and (len(spans) == 1 or _need(heads, spans) <= limits.work)
    )


def _piece(span: Span, done: int, room: int, head: int, *, together: int) -> Span | None:
    """The next rows of ``span`` that fit: rows, and wanted rows; None where none do.

    ``together``: wanted rows that an empty pass can hold.
    """
    count = len(span.tokens)
    first_wanted = count - span.wanted
    end = min(count, done + room, max(first_wanted, done) + head)
    if span.wanted <= together and first_wanted < end < count:
        end = first_wanted
    return span.part(done, end) if end > done else None


def _need(heads: Heads, pieces: Sequence[Span]) -> int:
    longest = max(len(piece.tokens) for piece in pieces)
    return need(heads, [piece.end for piece in pieces], bucket(longest, POWERS))


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
