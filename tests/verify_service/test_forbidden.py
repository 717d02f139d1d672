"""Bans at every temperature, what happens where nothing is left, and exact log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from outrider.draft_service.engine import DraftEngine
from outrider.shared.core.errors import InvalidRequest, RefusalCode
from outrider.shared.core.rules import COUPLED, REJECTION, RULES, Rule
from outrider.shared.core.types import PARAMETERS, Decoding, OpenSequence, ProposeItem, VerifyItem
from outrider.shared.sampling.choose import RowContext, choose, process, propose
from outrider.verify_service.acceptance import JudgeItem, judge
from outrider.verify_service.engine import VerifyEngine
from outrider_testing import engines

VOCAB = engines.VOCAB
EXTREMES = (1e-6, 9e-4, 1e-3, 0.005, 1.0, 1e6, 1e30)
PROMPT = (5, 6, 7)


def random_logits(rows: int, seed: int, scale: float = 4.0) -> torch.Tensor:
    return torch.randn(rows, 97, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("temperature", EXTREMES)
@pytest.mark.parametrize("rule", [COUPLED, REJECTION])
def test_forbidden_tokens_are_never_chosen_at_any_temperature(
    temperature: float, rule: Rule
) -> None:
    banned = tuple((token,) for token in range(90))
    kept = set(range(90, 97))
    for extra in ({}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}):
        for seed in range(20):
            d = Decoding(temperature, seed=seed, bad_words=banned, rule=rule, **extra)  # type: ignore[arg-type]
            logits, row = random_logits(1, seed), RowContext(d, PROMPT)
            assert choose(process(logits, [row]), [row])[0] in kept
            (token,), (sparse,) = propose(logits, [row])
            assert token in kept
            assert sparse is None or set(sparse.ids) <= kept
            (judged,) = judge(logits, [JudgeItem(d, PROMPT)])
            assert judged is not None
            assert judged.next_token in kept


@pytest.mark.parametrize("biased", [-1e20, 1e20])
@pytest.mark.parametrize("penalty", [1e-6, 1e6])
@pytest.mark.parametrize("temperature", [0.0, *EXTREMES])
def test_parameters_at_their_limits_leave_a_distribution(
    temperature: float, penalty: float, biased: float
) -> None:
    bias = ((5, biased), (11, -biased))
    d = Decoding(temperature, repetition_penalty=penalty, logit_bias=bias, rule=COUPLED)
    (row,) = process(random_logits(1, 1), [RowContext(d, PROMPT)])
    assert not row.isnan().any()
    assert row.softmax(-1).sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", 1e39), ("repetition_penalty", 1e-30), ("logit_bias", 1e30)]
)
def test_parameters_beyond_float32_are_refused_with_their_limits(name: str, value: float) -> None:
    sent = {4: value} if name == "logit_bias" else value
    with pytest.raises(InvalidRequest, match=rf"sampling\.{name}.*must be .*in \["):
        PARAMETERS[name].kind.checked(f"sampling.{name}", sent, 97)


def test_a_bad_word_that_ends_the_text_is_forbidden_too() -> None:
    d = Decoding(bad_words=((40,), (41,)), eos_token_ids=(40, 41))
    logits = random_logits(1, 2)
    logits[0, 40] = 99.0
    (row,) = process(logits, [RowContext(d, PROMPT)])
    assert row[40] == row[41] == -math.inf


def all_but(allowed: Sequence[int], after: int) -> tuple[tuple[int, ...], ...]:
    """Words that allow ``allowed`` anywhere but after ``after``, and nothing else ever."""
    singles = [(token,) for token in range(VOCAB) if token not in allowed]
    return (*singles, *((after, token) for token in allowed))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("k", [0, 1, 2, 5])
def test_where_nothing_is_allowed_the_text_ends_as_without_proposals(rule: Rule, k: int) -> None:
    """The same tokens up to the place, whatever was proposed, and then a refusal."""
    runner = engines.runner(engines.tiny_llama(1))
    verify, draft = VerifyEngine(runner, 5), DraftEngine(engines.runner(engines.tiny_llama(1)), 5)
    decoding = Decoding(
        0.8 if rule.samples else 0.0,
        seed=3,
        rule=rule,
        prompt_len=3,
        bad_words=all_but((10, 11, 12), after=12),
        logit_bias=((12, -2.0),),
        frequency_penalty=0.5,
    )
    base, ahead = verify.connect(), draft.connect()
    base.open(OpenSequence(1, 1, 80, decoding))
    ahead.open(OpenSequence(1, 1, 80, decoding))
    log = list(PROMPT)
    known = 0
    for _ in range(70):
        proposal, rows = (), ()
        if k:
            offer = ahead.round([ProposeItem(1, 1, known, tuple(log[known:]), k)]).answers[0]
            proposal, rows = offer.tokens, offer.rows
        at = len(log) - 1 if len(log) > 3 else 0
        result = base.round([VerifyItem(1, 1, at, tuple(log[at:]), proposal, rows)])
        if result.refusals:
            (refusal,) = result.refusals
            assert refusal.code == RefusalCode.NOTHING_ALLOWED
            break
        (verdict,) = result.answers
        known = min(len(log) + verdict.num_accepted, len(log) + max(len(proposal) - 1, 0))
        log += [*proposal[: verdict.num_accepted], verdict.next_token]
    else:
        raise AssertionError("it did not end")
    assert log[-1] == 12
    assert set(log[3:-1]) <= {10, 11}


@pytest.mark.parametrize("temperature", [1e-6, 0.003, 0.009, 0.7, 0.0])
@pytest.mark.parametrize("cuts", [{}, {"top_k": 5}, {"top_p": 0.9}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_exact_arithmetic(
    temperature: float, cuts: dict[str, float], dtype: torch.dtype
) -> None:
    d = Decoding(temperature, seed=1, logprobs=20, rule=COUPLED, **cuts)  # type: ignore[arg-type]
    logits = random_logits(1, 3, scale=30.0).to(dtype)
    (judged,) = judge(logits, [JudgeItem(d, PROMPT)])
    assert judged is not None
    (told,) = judged.logprobs
    processed = process(logits, [RowContext(d, PROMPT)])[0]
    exact = (logits[0].double() / (temperature or 1.0)).masked_fill(
        processed == -math.inf, -math.inf
    )
    exact = exact.log_softmax(-1)
    assert told.logprob == pytest.approx(exact[judged.next_token].item(), rel=1e-12, abs=1e-12)
    for token, value in told.top:
        assert value == pytest.approx(exact[token].item(), rel=1e-12, abs=1e-12)
