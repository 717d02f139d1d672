"""Stops against a reference that looks at the text one character at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.coordinator.requests.text.output import Output
from outrider.coordinator.requests.text.stopping import Finish, FinishReason, TokenStops
from outrider_testing.stops import Part, may_become_stop, naive, parts_of

STOPS = st.lists(
    st.lists(st.sampled_from(["a", "b", "c", "<c>"]), min_size=1, max_size=4).map("".join),
    max_size=4,
)


class Letters:
    """A decoder whose token i is one or two letters."""

    WORDS = ("a", "b", "c", "ab", "bc", "ca", "cc", "")

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.WORDS[token] for token in ids)

    def keeps_run_open(self, token: int) -> bool:
        return False

    def byte(self, token: int) -> int | None:
        return None

    def special_tokens(self) -> dict[int, str]:
        return {7: "<c>"}


EOS, STOP = 6, 5


def reference(
    tokens: Sequence[int], stops: Sequence[str], limit: int
) -> tuple[list[int], list[Part], Finish | None]:
    """Tokens, text and end of a run that goes one token, and one character, at a time."""
    letters, special = Letters(), Letters().special_tokens()
    out: list[int] = []
    parts: list[Part] = []
    for token in tokens:
        out.append(token)
        if token in (EOS, STOP):
            reason = FinishReason.END_OF_SEQUENCE if token == EOS else FinishReason.STOP_TOKEN
            return out, parts, Finish(reason, stop_token_id=token)
        parts += [(special[token], True)] if token in special else parts_of(letters.decode([token]))
        _, stop = naive(parts, stops)
        if stop is not None:
            return out, parts, Finish(FinishReason.STOP_STRING, stop_string=stop)
        if len(out) == limit:
            return out, parts, Finish(FinishReason.MAX_TOKENS)
    return out, parts, None


@settings(max_examples=400, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 7), max_size=40),
    stops=STOPS,
    limit=st.integers(1, 40),
    seed=st.integers(0, 999),
    lazy=st.booleans(),
)
def test_output_equals_reference_however_tokens_are_cut_into_blocks(
    tokens: list[int], stops: list[str], limit: int, seed: int, lazy: bool
) -> None:
    rng = random.Random(seed)
    output = Output(
        Letters(), (), stop_strings=tuple(stops), stops=TokenStops((EOS,), (STOP,), limit)
    )
    text, ids, origins, start = "", [], [], 0

    def fetch() -> None:
        nonlocal text
        delta = output.fetch()
        if delta is not None:
            text += delta.text
            ids.extend(delta.token_ids)
            origins.extend(delta.origins)

    while start < len(tokens) and output.finish is None:
        block = tokens[start : start + rng.randint(1, 6)]
        output.push(block, [1] * len(block))
        start += len(block)
        if not (lazy and rng.random() < 0.5):
            fetch()
    wanted_ids, parts, wanted_end = reference(tokens, stops, limit)
    wanted_text, _ = naive(parts, stops)
    fetch()
    assert output.finish == wanted_end
    assert ids == wanted_ids
    assert len(origins) == len(ids) == output.emitted
    if wanted_end is not None:
        assert text == wanted_text
    else:
        held = may_become_stop(parts, stops)
        assert text == wanted_text[: len(wanted_text) - held]


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 4), min_size=1, max_size=20),
    stops=STOPS,
    cut=st.integers(0, 20),
)
def test_output_resumed_sends_exactly_the_rest(
    tokens: list[int], stops: list[str], cut: int
) -> None:
    cut = min(cut, len(tokens))

    def make() -> Output:
        return Output(
            Letters(), (), stop_strings=tuple(stops), stops=TokenStops((), (), len(tokens))
        )

    def run(output: Output, part: Sequence[int]) -> str:
        text = ""
        for token in part:
            if output.finish is None:
                output.push([token], [1])
                delta = output.fetch()
                text += delta.text if delta else ""
        delta = output.fetch()
        return text + (delta.text if delta else "")

    whole = make()
    first, second = run(whole, tokens[:cut]), ""
    ended_before = whole.finish is not None
    second = run(whole, tokens[cut:])
    resumed = make()
    resumed.resume(tokens[:cut])
    if ended_before:
        assert resumed.finish == whole.finish
    else:
        assert run(resumed, tokens[cut:]) == second
        assert resumed.finish == whole.finish
    assert isinstance(first, str)


def test_output_token_limit_ends_exactly_there() -> None:
    output = Output(None, (), stops=TokenStops((), (), 3))
    assert output.push([1, 2], [1, 1]) is None
    assert output.left == 1
    assert output.push([3, 4], [1, 1]) == Finish(FinishReason.MAX_TOKENS)
    delta = output.fetch()
    assert delta is not None and list(delta.token_ids) == [1, 2, 3]


def test_output_slow_reader_gets_one_merged_delta() -> None:
    wakes = []
    output = Output(Letters(), (), stops=TokenStops((), (), 10_000), wake=lambda: wakes.append(1))
    for _ in range(1000):
        output.push([0, 1], [1, 2])
    delta = output.fetch()
    assert delta is not None
    assert delta.text == "ab" * 1000
    assert len(delta.token_ids) == 2000
    assert output.fetch() is None
    assert len(wakes) == 1000
