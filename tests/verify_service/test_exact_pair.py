"""The bundled pair in three types: its text does not depend on K, company or a new start.

``OUTRIDER_PAIR_PROMPTS`` sets how many of the held-out prompts; the slow lane takes all.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache

import pytest

from outrider.coordinator.requests.text.tokenizer import load_tokenizer
from outrider.draft_service.engine import DraftEngine
from outrider.shared import pair
from outrider.shared.config.schema import ModelConfig
from outrider.shared.core.rules import COUPLED
from outrider.shared.core.types import Decoding
from outrider.shared.model.loading import load_runner
from outrider.verify_service.engine import VerifyEngine
from outrider_testing.engines import speculate

PROMPTS = min(200, int(os.environ.get("OUTRIDER_PAIR_PROMPTS", "2")))
TOKENS, HALF = 128, 64
GREEDY = Decoding()
SAMPLED = Decoding(temperature=0.8, rule=COUPLED)


@cache
def prompts() -> list[list[int]]:
    encode = load_tokenizer(str(pair.path("base"))).encode
    texts = [str(entry["text"]) for entry in pair.heldout_prompts()]
    return [encode(text) for text in texts[:: len(texts) // PROMPTS][:PROMPTS]]


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED], ids=["greedy", "coupled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_pair_text_is_the_same_for_any_k_company_and_start(dtype: str, decoding: Decoding) -> None:
    options = {"device": "cpu", "dtype": dtype, "arena_bytes": 64 << 20}
    base = load_runner(ModelConfig(path="base", **options))  # type: ignore[arg-type]
    draft = load_runner(ModelConfig(path="draft", **options))  # type: ignore[arg-type]
    assert base.facts.dtype == dtype
    verify, helper = VerifyEngine(base, 8), DraftEngine(draft, 8)
    for begin in range(0, PROMPTS, 4):
        some = prompts()[begin : begin + 4]
        asked = [
            replace(decoding, seed=begin + i, prompt_len=len(one)) for i, one in enumerate(some)
        ]
        alone = [
            speculate(verify, None, [one], TOKENS, 0, how)[0].written
            for one, how in zip(some, asked, strict=True)
        ]
        for k in (1, 4):
            found = speculate(verify, helper, some, TOKENS, k, asked)
            assert [course.written for course in found] == alone, k
        again = [one + text[:HALF] for one, text in zip(some, alone, strict=True)]
        found = speculate(verify, helper, again, TOKENS - HALF, 4, asked, chunk=48)
        assert [course.written for course in found] == [text[HALF:] for text in alone]
