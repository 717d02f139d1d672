"""How batches are cut for the kernels: pure arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.kernels.attention_shapes import Heads, need
from outrider.shared.kv.arena import Extent
from outrider.shared.model.cuda.passes import (
    GRAPH_ROWS,
    HEAD_ROWS,
    POWERS,
    ROW_SIZES,
    PassLimits,
    bucket,
    cut_spans,
    row_size,
    rows_in_order,
)
from outrider.shared.model.runner import Span

HEADS = Heads(8, 2, 64)
ROOMY = 1 << 40
ROWS = 64


def span(start: int, count: int, wanted: int) -> Span:
    return Span(Extent(1 << 20, ((0, 1 << 20),)), start, list(range(count)), wanted)


@given(
    st.lists(
        st.tuples(st.integers(0, 500), st.integers(1, 200), st.integers(0, 200)),
        min_size=1,
        max_size=12,
    )
)
def test_passes_hold_every_row_once_in_order_and_fit(sizes):
    spans = [span(start, count, min(wanted, count)) for start, count, wanted in sizes]
    passes = cut_spans(spans, HEADS, PassLimits(ROWS, ROOMY))
    seen: dict[int, list[int]] = {i: [] for i in range(len(spans))}
    wanted = dict.fromkeys(seen, 0)
    for taken in passes:
        assert len({i for i, _ in taken}) == len(taken)
        assert 0 < sum(len(piece.tokens) for _, piece in taken) <= ROWS
        for i, piece in taken:
            assert piece.start == spans[i].start + len(seen[i])
            seen[i].extend(piece.tokens)
            wanted[i] += piece.wanted
            assert piece.wanted <= len(piece.tokens)
    for i, own in enumerate(spans):
        assert seen[i] == list(own.tokens)
        assert wanted[i] == own.wanted


def test_a_pass_stays_within_the_scratch_memory_where_pieces_allow():
    spans = [span(640, 4, 4) for _ in range(8)]
    one = need(HEADS, [644], 4)
    passes = cut_spans(spans, HEADS, PassLimits(ROWS, 3 * one))
    assert [len(taken) for taken in passes] == [3, 3, 2]
    # A single piece that is too large by itself still runs.
    assert len(cut_spans(spans[:1], HEADS, PassLimits(ROWS, 1))) == 1


def test_rows_come_back_in_the_order_of_the_spans():
    assert rows_in_order([(0, 2), (1, 3)]) is None
    assert rows_in_order([(1, 2), (0, 1), (2, 2), (0, 1)]) == [2, 5, 0, 1, 3, 4]


def test_wanted_rows_stay_together_and_fit_the_logits():
    # A prompt's end, proposals beside it, and one whose wanted rows alone are too many.
    spans = [span(0, 300, 1), *(span(50, 9, 9) for _ in range(40)), span(0, 600, 600)]
    passes = cut_spans(spans, HEADS, PassLimits(500, ROOMY))
    for taken in passes:
        assert sum(piece.wanted for _, piece in taken) <= HEAD_ROWS
        for i, piece in taken:
            assert piece.wanted in ((0, spans[i].wanted) if i <= 40 else range(HEAD_ROWS + 1))
    assert sum(piece.wanted for taken in passes for _, piece in taken) == 1 + 40 * 9 + 600


@pytest.mark.parametrize("sizes", [ROW_SIZES, POWERS])
def test_buckets_hold_what_they_are_for(sizes):
    for value in range(1, GRAPH_ROWS + 1):
        assert bucket(value, sizes) >= value
    assert bucket(GRAPH_ROWS, sizes) == row_size(GRAPH_ROWS) == GRAPH_ROWS
    assert row_size(GRAPH_ROWS + 1) == GRAPH_ROWS + 1
