"""Judging and proposing in one call: the tokens that the logits would give."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.shared.core.types import Decoding
from outrider.shared.model.runner import Runner, Span
from outrider_testing import engines
from outrider_testing.architectures import tiny

GREEDY = Decoding()
RUNNERS = {
    "full": engines.runner(tiny("llama", {}), runner="cpu", prefill_chunk=64),
    "ring": engines.runner(tiny("mistral", {}), runner="cpu", prefill_chunk=16, max_k=8),
}


def likeliest(runner: Runner, log: list[int], count: int) -> list[int]:
    """The tokens that follow ``log``, by the logits of one row after the other."""
    extent = runner.arena.admit(len(log) + count)
    tokens, rest = [], list(log)
    with torch.inference_mode():
        for _ in range(count):
            while len(rest) > 8:
                runner.forward([Span(extent, extent.valid_len, rest[:8], 0)])
                rest = rest[8:]
            tokens.append(int(runner.forward([Span(extent, extent.valid_len, rest, 1)]).argmax()))
            rest = tokens[-1:]
    runner.arena.free(extent)
    return tokens


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_propose_gives_each_sequence_its_own_next_tokens(data: st.DataObject) -> None:
    runner = RUNNERS[data.draw(st.sampled_from(sorted(RUNNERS)))]
    draw = random.Random(data.draw(st.integers(0, 1000)))
    ks = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    logs = [[draw.randrange(97) for _ in range(draw.randint(1, 9))] for _ in ks]
    extents = [runner.arena.admit(len(log) + 8) for log in logs]
    spans = [
        Span(extent, 0, log, min(k, 1)) for extent, log, k in zip(extents, logs, ks, strict=True)
    ]
    found = runner.propose(spans, [GREEDY] * len(ks), ks)
    if not any(ks):
        assert found is None
    else:
        assert found == [likeliest(runner, log, k) for log, k in zip(logs, ks, strict=True)]
        lengths = [len(log) + max(k - 1, 0) for log, k in zip(logs, ks, strict=True)]
        assert [extent.valid_len for extent in extents] == lengths
    for extent in extents:
        runner.arena.free(extent)


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_judge_accepts_what_the_logits_would_and_goes_on_from_there(data: st.DataObject) -> None:
    runner = RUNNERS[data.draw(st.sampled_from(sorted(RUNNERS)))]
    draw = random.Random(data.draw(st.integers(0, 1000)))
    sizes = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=3))
    logs = [[draw.randrange(97) for _ in range(draw.randint(1, 9))] for _ in sizes]
    right = [likeliest(runner, log, k + 1) for log, k in zip(logs, sizes, strict=True)]
    good = [draw.randint(0, k) for k in sizes]
    proposals = [
        [*tokens[:n], *((token + 1) % 97 for token in tokens[n:k])]
        for tokens, n, k in zip(right, good, sizes, strict=True)
    ]
    extents = [runner.arena.admit(20) for _ in sizes]
    spans = [
        Span(extent, 0, [*log, *proposal], len(proposal) + 1)
        for extent, log, proposal in zip(extents, logs, proposals, strict=True)
    ]
    found = runner.judge(spans, [GREEDY] * len(sizes), proposals)
    assert found == [(n, tokens[n]) for tokens, n in zip(right, good, strict=True)]
    for extent in extents:
        runner.arena.free(extent)


def test_propose_and_judge_stop_at_a_row_that_is_not_finite() -> None:
    model: Any = tiny("llama", {})
    log = [3, 1, 4]
    sound = engines.runner(model, runner="cpu")
    tokens = likeliest(sound, log, 6)
    at = next(i for i in range(1, 6) if tokens[i] not in log + tokens[:i])
    with torch.no_grad():
        model.model.embed_tokens.weight[tokens[at]] = float("nan")
    runner = engines.runner(model, runner="cpu")
    extent = runner.arena.admit(20)
    assert runner.propose([Span(extent, 0, log, 1)], [GREEDY], [6]) == [[*tokens[: at + 1], -1]]
    extent.clear()
    span = Span(extent, 0, [*log, *tokens[:5]], 6)
    verdict = runner.judge([span], [GREEDY], [tokens[:5]])
    assert verdict == [(at + 1, -1)] if at < 5 else [(5, tokens[5])]


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(temperature=0.7),
        Decoding(logprobs=1),
        Decoding(repetition_penalty=1.2),
        Decoding(logit_bias=((5, 1.0),)),
        Decoding(vocab_size=50),
    ],
)
def test_likeliest_is_left_to_the_logits_where_anything_changes_them(decoding: Decoding) -> None:
    runner = RUNNERS["full"]
    extent = runner.arena.admit(9)
    span = Span(extent, 0, [1, 2], 1)
    assert runner.propose([span], [decoding], [3]) is None
    assert runner.judge([span], [decoding], [()]) is None
    assert extent.valid_len == 0
    runner.arena.free(extent)
