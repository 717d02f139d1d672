"""Every rule with every parameter, K and batch: speculation changes neither token nor law.

Draft and base are real engines over random models in float32. The reference for tokens is plain
decoding, one sequence at a time; for log-probabilities, transformers over the whole text.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from outrider.draft_service.engine import DraftEngine
from outrider.shared.core.rules import RULES
from outrider.shared.core.types import PARAMETERS as DECLARED
from outrider.shared.core.types import Decoding
from outrider.verify_service.engine import VerifyEngine
from outrider_testing import engines, processors

COUNT = 12
PROMPT = 8
TOP = 5
KS = (0, 1, 4, 7)
PARAMETERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "repetition": {"repetition_penalty": 1.3},
    "presence": {"presence_penalty": 0.9},
    "frequency": {"frequency_penalty": 0.7},
    "bias": {"logit_bias": ((5, 4.0), (11, 4.0), (0, -100.0))},
    "bad_words": {"bad_words": ((9,), (5, 11), (4, 5, 6), (11, 11))},
    "min_new_tokens": {"min_new_tokens": 6, "eos_token_ids": (5, 17, 40, 41, 42)},
}
PARAMETERS["all"] = {name: value for one in PARAMETERS.values() for name, value in one.items()}
SAMPLED = {"temperature": 0.9, "seed": 6, "draft_top": 16}


@pytest.fixture(scope="module")
def pair() -> tuple[Any, VerifyEngine, DraftEngine]:
    """A base and a draft that resembles it, so that some of its tokens stand."""
    base, near = engines.tiny_llama(1), engines.tiny_llama(1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        near.lm_head.weight += 0.15 * torch.randn(near.lm_head.weight.shape, generator=generator)
    verify = VerifyEngine(engines.runner(engines.tiny_llama(1)), 8)
    return base, verify, DraftEngine(engines.runner(near), 8)


def test_every_parameter_is_in_the_matrix() -> None:
    assert set(PARAMETERS["all"]) - {"eos_token_ids"} == set(DECLARED) - set(SAMPLED)


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("rule", RULES)
def test_tokens_and_logprobs_do_not_depend_on_speculation(pair: Any, rule: str, name: str) -> None:
    model, verify, draft = pair
    sampling = SAMPLED if RULES[rule].samples else {}
    decoding = Decoding(
        rule=RULES[rule], prompt_len=PROMPT, logprobs=TOP, **sampling, **PARAMETERS[name]
    )
    asked = engines.prompts(4, seed=9, shortest=PROMPT, longest=PROMPT)
    plain = [engines.speculate(verify, None, [one], COUNT, 0, decoding)[0] for one in asked]
    accepted = 0
    for k in KS:
        for batch in (1, 4):
            courses = engines.speculate(verify, draft, asked[:batch], COUNT, k, decoding)
            for course, alone in zip(courses, plain, strict=False):
                if not RULES[rule].needs_rows or k == 0:
                    assert course.written == alone.written, (k, batch)
                _check_logprobs(model, course, decoding)
                accepted += course.accepted
    assert accepted > 0  # else nothing was tried
    assert verify.info().arena_tokens_used == draft.info().arena_tokens_used == 0


def _check_logprobs(model: Any, course: Any, decoding: Decoding) -> None:
    expected = processors.logprobs(model, course.log, decoding)
    assert len(course.logprobs) == COUNT
    for token, got, row in zip(course.written, course.logprobs, expected, strict=True):
        assert got.logprob == pytest.approx(row[token].item(), abs=1e-4)
        best = row.topk(TOP)
        possible = int((best.values > -float("inf")).sum())
        assert [value for _, value in got.top] == pytest.approx(
            best.values[:possible].tolist(), abs=1e-4
        )
        for other, value in got.top:
            assert row[other].item() == pytest.approx(value, abs=1e-4)
