"""The suffix automaton against a search through the whole text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.draft_service.ngram import automaton as module
from outrider.draft_service.ngram.automaton import BYTES_PER_TOKEN, SuffixAutomaton

FEW = st.lists(st.integers(0, 2), min_size=1, max_size=60)
WIDE = st.lists(st.sampled_from([0, 1, 7, 50_000, 2**32 - 1]), min_size=1, max_size=40)
# A word again and again, with something else now and then: long matches, and many splits.
PERIODIC = st.builds(
    lambda word, times, more: [one for end in more for one in (*word * times, *end)],
    st.lists(st.integers(0, 3), min_size=1, max_size=5),
    st.integers(1, 4),
    st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=4),
)
TEXTS = FEW | WIDE | PERIODIC


def automaton(capacity: int, fill: int = 0) -> SuffixAutomaton:
    memory = bytearray([fill]) * (BYTES_PER_TOKEN * capacity)
    return SuffixAutomaton(memoryview(memory).cast("I"))


def ends_of(text: Sequence[int], length: int) -> list[int]:
    """Where the last ``length`` tokens of ``text`` ended before."""
    wanted = text[len(text) - length :]
    return [end for end in range(length, len(text)) if text[end - length : end] == wanted]


def longest(text: Sequence[int]) -> int:
    """Length of the longest suffix of ``text`` that occurs twice in it."""
    return max(n for n in range(len(text)) if n == 0 or ends_of(text, n))


@given(TEXTS)
def test_automaton_finds_the_longest_suffix_seen_before(text: list[int]) -> None:
    made = automaton(len(text), fill=0xAB)
    for size, token in enumerate(text, start=1):
        made.add(token)
        so_far = text[:size]
        assert made.size == size and made.text(0, size) == so_far
        assert made.match_len == longest(so_far)
        if made.match_len:
            assert made.match_end in ends_of(so_far, made.match_len)


@given(TEXTS)
def test_automaton_takes_the_last_place_of_several(text: list[int]) -> None:
    made = automaton(len(text))
    with mock.patch.object(module, "MOST_RECENT", len(text)):
        for size, token in enumerate(text, start=1):
            made.add(token)
            if made.match_len:
                assert made.match_end == ends_of(text[:size], made.match_len)[-1]


@given(TEXTS, TEXTS)
def test_automaton_begins_anew_after_clear(before: list[int], text: list[int]) -> None:
    used, fresh = automaton(120), automaton(120)
    for token in before[:120]:
        used.add(token)
    used.clear()
    for token in text[:120]:
        used.add(token)
        fresh.add(token)
        assert (used.match_len, used.match_end) == (fresh.match_len, fresh.match_end)
    assert used.continuation(9) == fresh.continuation(9)


@given(TEXTS, st.integers(0, 12))
def test_continuation_is_what_followed_and_goes_on_with_itself(text: list[int], count: int) -> None:
    made = automaton(len(text))
    for token in text:
        made.add(token)
    wanted: list[int] = []
    if made.match_len:
        longer = list(text)
        for at in range(made.match_end, made.match_end + count):
            longer.append(longer[at])
        wanted = longer[len(text) :]
    assert made.continuation(count) == wanted


def test_continuation_of_a_period_repeats_it() -> None:
    made = automaton(16)
    for token in (9, 1, 2, 3, 1, 2, 3, 1, 2):
        made.add(token)
    assert (made.match_len, made.match_end) == (5, 6)
    assert made.continuation(8) == [3, 1, 2, 3, 1, 2, 3, 1]


@pytest.mark.parametrize("capacity", [1, 2, 3, 200])
@pytest.mark.parametrize("kind", ["one", "two", "all", "random"])
def test_automaton_has_room_for_its_capacity_and_no_more(capacity: int, kind: str) -> None:
    draw = random.Random(3)
    tokens = {"one": lambda i: 5, "two": lambda i: i & 1, "all": lambda i: i}
    of = tokens.get(kind, lambda i: draw.randrange(2))
    # What lies behind its memory is another sequence's.
    memory = memoryview(bytearray(b"\x5a") * (BYTES_PER_TOKEN * (capacity + 1))).cast("I")
    own = capacity * BYTES_PER_TOKEN // 4
    made = SuffixAutomaton(memory[:own])
    assert made.capacity == capacity
    for i in range(capacity):
        made.add(of(i))
    with pytest.raises(IndexError, match=f"room for {capacity} tokens"):
        made.add(0)
    assert set(memory[own:].tolist()) == {0x5A5A5A5A}


def test_adding_a_token_takes_as_many_steps_in_a_long_text() -> None:
    # Steps, not seconds: how often a transition is looked up, the loops of `add` all do that.
    class Counting(SuffixAutomaton):
        looked = 0

        def _edge(self, state: int, token: int) -> int:
            Counting.looked += 1
            return super()._edge(state, token)

    draw = random.Random(1)
    size = 4000
    for text in (
        [7] * size,
        [i % 3 for i in range(size)],
        [draw.randrange(2) for _ in range(size)],
    ):
        made = Counting(memoryview(bytearray(BYTES_PER_TOKEN * size)).cast("I"))
        Counting.looked = 0
        for token in text:
            made.add(token)
        assert Counting.looked <= 6 * size
