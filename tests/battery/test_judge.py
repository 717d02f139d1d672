"""The battery's judge passes what transformers writes, and finds what was changed in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from outrider.protos import generation_pb2 as pb
from outrider.shared.core.rules import COUPLED, GREEDY, REJECTION
from outrider_testing import engines
from outrider_testing.architectures import ARCHITECTURES, tiny
from outrider_testing.battery.cases import Asked
from outrider_testing.battery.judge import Answer, Judge
from outrider_testing.tokenizer_families import FAMILIES

COUNT = 12
GREEDILY = Asked((5, 60, 61), COUNT, 3, GREEDY, {}, logprobs=2)
DRAWN: dict[str, Any] = {"temperature": 0.7, "seed": 5, "bad_words": ((40,), (50, 51))}


@pytest.fixture(scope="module")
def judge() -> Judge:
    tokenizer = FAMILIES["byte-level"]()
    kind, changes = ARCHITECTURES["Qwen3"]
    model = tiny(kind, {**changes, "vocab_size": tokenizer.get_vocab_size()})
    return Judge(model, tokenizer, eos=(7,))


@pytest.fixture(scope="module")
def right(judge: Judge) -> Answer:
    """The answer to ``GREEDILY``, by transformers alone."""
    prompt = list(GREEDILY.prompt)
    ids = engines.reference(judge.model, prompt, COUNT)
    with torch.inference_mode():
        rows = judge.model(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
    logprobs = []
    for at, token in enumerate(ids):
        row = rows[len(prompt) - 1 + at]
        top = [
            SimpleNamespace(token_id=int(i), logprob=float(v))
            for v, i in zip(*row.topk(2), strict=True)
        ]
        logprobs.append(SimpleNamespace(logprob=float(row[token]), top=top))
    finished = pb.Finished(reason=pb.FINISH_REASON_MAX_TOKENS)
    return Answer(ids, judge.reply(prompt, ids), logprobs, finished)


def changed(answer: Answer, **changes: Any) -> Answer:
    values = {"ids": list(answer.ids), "logprobs": list(answer.logprobs)}
    return replace(answer, **values | changes)


def test_judge_passes_what_transformers_writes(judge: Judge, right: Answer) -> None:
    verdict = judge.judge(GREEDILY, right)
    assert not verdict.wrong
    assert not verdict.tie


def with_token(answer: Answer) -> Answer:
    return changed(answer, ids=[*answer.ids[:6], (answer.ids[6] + 1) % 90, *answer.ids[7:]])


def with_logprob(answer: Answer) -> Answer:
    one = SimpleNamespace(logprob=answer.logprobs[4].logprob - 0.01, top=answer.logprobs[4].top)
    return changed(answer, logprobs=[*answer.logprobs[:4], one, *answer.logprobs[5:]])


def with_reason(answer: Answer) -> Answer:
    return changed(answer, finished=pb.Finished(reason=pb.FINISH_REASON_END_OF_SEQUENCE))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (with_token, "token 6 is"),
        (with_logprob, "log-probability 4"),
        (with_reason, "must be MAX_TOKENS"),
        (lambda right: changed(right, text=right.text + "x"), "text "),
        (lambda right: changed(right, text=right.text[1:]), "text "),
        (lambda right: changed(right, ids=right.ids[:5], logprobs=right.logprobs[:5]), "without a"),
        (lambda right: changed(right, ids=[*right.ids, 9]), "13 tokens of at most 12"),
        (lambda right: changed(right, ids=[999, *right.ids[1:]]), "outside the vocabulary"),
        (lambda right: changed(right, logprobs=right.logprobs[:5]), "5 log-probabilities"),
        (lambda right: changed(right, finished=None), "no end"),
    ],
)
def test_judge_finds_what_was_changed(
    judge: Judge, right: Answer, change: Callable[[Answer], Answer], says: str
) -> None:
    found = judge.judge(GREEDILY, change(right))
    assert says in found.wrong
    assert not found.tie


def test_judge_finds_text_that_goes_on_after_its_end(judge: Judge, right: Answer) -> None:
    asked = replace(GREEDILY, stop_ids=(right.ids[3],))
    assert "which ends it as STOP_TOKEN" in judge.judge(asked, right).wrong
    asked = replace(GREEDILY, stop=(right.text[0],))
    assert "which ends it as STOP_STRING" in judge.judge(asked, right).wrong


@pytest.mark.parametrize("rule", [COUPLED, REJECTION])
def test_judge_finds_forbidden_tokens_whatever_the_rule(
    judge: Judge, right: Answer, rule: Any
) -> None:
    asked = replace(GREEDILY, rule=rule, sampling=DRAWN)
    finished = pb.Finished(reason=pb.FINISH_REASON_MAX_TOKENS, seed=5)
    ids = [40, *right.ids[1:]]
    assert "forbidden" in judge.judge(asked, changed(right, ids=ids, finished=finished)).wrong


def test_judge_finds_a_sample_of_another_seed(judge: Judge, right: Answer) -> None:
    asked = replace(GREEDILY, rule=COUPLED, sampling={"temperature": 5.0, "seed": 5})
    finished = pb.Finished(reason=pb.FINISH_REASON_MAX_TOKENS, seed=5)
    assert "must be" in judge.judge(asked, changed(right, finished=finished)).wrong
