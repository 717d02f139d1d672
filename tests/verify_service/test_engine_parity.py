"""Speculation changes no token: engines against Hugging Face's generate on the base alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from outrider.draft_service.engine import DraftEngine
from outrider.verify_service.engine import VerifyEngine
from outrider_testing import engines

COUNT = 24


@pytest.fixture(scope="module", params=["llama", "llama-generic", "gpt2"])
def pair(request: pytest.FixtureRequest) -> Any:
    """(the base as Hugging Face has it, verify engine, draft engine of another random model)"""
    make = engines.tiny_gpt2 if request.param == "gpt2" else engines.tiny_llama
    kind = "llama" if request.param == "llama" else "generic"
    base = engines.runner(make(1), runner=kind)
    draft = engines.runner(make(2, layers=1, hidden=16), runner=kind)
    return make(1), VerifyEngine(base, 16), DraftEngine(draft, 16)


@pytest.mark.parametrize("k", range(9))
def test_greedy_equals_generate_whatever_the_draft(pair: Any, k: int) -> None:
    model, verify, draft = pair
    batch = 1 + k % 8
    asked = engines.prompts(batch, seed=k)
    courses = engines.speculate(verify, draft, asked, COUNT, k)
    for course, prompt in zip(courses, asked, strict=True):
        assert course.written == engines.reference(model, prompt, COUNT)
    assert verify.info().arena_tokens_used == 0
    assert draft.info().arena_tokens_used == 0


def test_greedy_batch_of_eight_with_a_k_of_its_own_each(pair: Any) -> None:
    model, verify, draft = pair
    asked = engines.prompts(8, seed=100)
    courses = engines.speculate(verify, draft, asked, COUNT, [0, 1, 2, 3, 4, 5, 6, 8], chunk=5)
    for course, prompt in zip(courses, asked, strict=True):
        assert course.written == engines.reference(model, prompt, COUNT)


@pytest.mark.parametrize("k", [1, 4, 8])
def test_draft_that_equals_the_base_is_accepted_wholly(pair: Any, k: int) -> None:
    model, verify, _ = pair
    twin = DraftEngine(verify.runner, 16)
    asked = engines.prompts(4, seed=7)
    courses = engines.speculate(verify, twin, asked, COUNT, k)
    for course, prompt in zip(courses, asked, strict=True):
        assert course.proposed == course.accepted > 0
        assert course.written == engines.reference(model, prompt, COUNT)


def test_rollback_to_every_position_gives_the_logits_of_a_full_recompute(pair: Any) -> None:
    from outrider.shared.model.runner import Span

    model, verify, _ = pair
    runner = verify.runner
    tokens = engines.prompts(1, seed=3, shortest=24, longest=24)[0]
    other = engines.prompts(1, seed=4, shortest=24, longest=24)[0]
    extent = runner.arena.admit(32)
    neighbour = runner.arena.admit(32)
    with torch.inference_mode():
        runner.forward([Span(neighbour, 0, other, 1)])
        for length in range(len(tokens)):
            # What is rolled back was of another text, so stale KV would show.
            extent.clear()
            runner.forward([Span(extent, 0, tokens[:length] + other[length:], 1)])
            assert runner.arena.rollback(extent, length)
            logits = runner.forward([Span(extent, length, tokens[length : length + 1], 1)])
            fresh = model(torch.tensor([tokens[: length + 1]])).logits[0, -1]
            torch.testing.assert_close(logits[0], fresh, atol=2e-4, rtol=1e-4)
    runner.arena.free(extent)
    runner.arena.free(neighbour)
