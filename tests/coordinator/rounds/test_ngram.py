"""Requests with the n-gram draft, over every link of hosts: proposals are whole, short or empty."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from outrider.coordinator.telemetry.records import NoObserver, RoundRecord
from outrider.shared.config.schema import DraftConfig, VerifyConfig
from outrider.shared.core.errors import ConfigError
from outrider.shared.core.rules import RULES
from outrider_testing import engines
from outrider_testing.clients import ask
from outrider_testing.model_services import start_model
from outrider_testing.waiting import soon

Make = Callable[..., Any]
# None is longer than what goes along with a proposal, so that which rounds have one does not depend
# on when the requests came.
PROMPTS = [[5, 9, 40, 5, 9, 40, 5], [7] * 20, [11], list(range(30, 48))]
COUNT = 60
K = 5
ALLOWED = (5, 7, 9, 40)
"""With so few tokens to choose from, the text of a random base repeats itself now and then."""
FORBIDDEN = [token for token in range(320) if token not in ALLOWED]
WAYS: dict[str, dict[str, Any]] = {
    "messages": {"link": "grpc", "grant_rounds": 0},
    "grants": {"link": "grpc", "grant_rounds": 5},
    "mailbox": {"link": "shm", "grant_rounds": 5},
}


class Offered(NoObserver):
    """Counts how many tokens sequences were proposed in a round, and notes the links."""

    enabled = True

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.links: set[str] = set()

    def round(self, record: RoundRecord) -> None:
        self.links.add(record.link)
        self.counts.update(one.proposed for one in record.sequences if one.emitted)


@pytest.fixture(scope="module")
def pair(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A real base, and the draft without a model."""
    folder = tmp_path_factory.mktemp("ngram")
    base = VerifyConfig(
        path=str(tiny_base), device="cpu", dtype="float32", arena_bytes=32 << 20, threads=1
    )
    with ExitStack() as stack:
        made = {}
        for role, config in (("verify", base), ("draft", DraftConfig(path="ngram"))):
            made[role] = start_model(role, config, f"unix:{folder}/{role}")
            stack.callback(made[role].server.drain, grace=0)
        yield SimpleNamespace(**made, folder=tiny_base)


@pytest.fixture(scope="module")
def written(tiny_base: Path) -> list[list[int]]:
    """What transformers' generate writes after each of ``PROMPTS`` with the base alone."""
    import torch
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(str(tiny_base), dtype=torch.float32)
    model.eval()
    return [
        engines.reference(model, prompt, COUNT, eos_token_id=None, suppress_tokens=FORBIDDEN)
        for prompt in PROMPTS
    ]


async def texts(
    pair: SimpleNamespace, client_of: Make, way: str, seen: Any = None, **asked: Any
) -> list[list[int]]:
    """The tokens after each of ``PROMPTS``, all asked for at once."""
    settings = WAYS[way] | {"tokenizer": str(pair.folder), "draft_patience_seconds": 30.0}
    asked |= {"logit_bias": dict.fromkeys(FORBIDDEN, -1e6), "stopping": {"ignore_eos": True}}
    async with client_of(pair.verify, pair.draft, seen, **settings) as client:
        info = await client.info()
        assert (info.link, info.link_reason, info.draft.name) == (WAYS[way]["link"], "", "ngram")
        results = await asyncio.gather(
            *(client.generate(ask(prompt, COUNT, **asked)) for prompt in PROMPTS)
        )
    assert [result.error for result in results] == [None] * len(PROMPTS)
    soon(lambda: not any(one.engine.info().arena_tokens_used for one in (pair.verify, pair.draft)))
    return [result.only.ids for result in results]


@pytest.mark.parametrize("k", [1, K, None])
@pytest.mark.parametrize("way", WAYS)
async def test_ngram_greedy_equals_transformers(
    pair: SimpleNamespace, client_of: Make, written: list[list[int]], way: str, k: int | None
) -> None:
    seen = Offered()
    assert await texts(pair, client_of, way, seen, k=k) == written
    if k == K:
        # Whole proposals, short ones and rounds without any.
        assert {0, K} < set(seen.counts) and max(seen.counts) == K
        assert ("shm" in seen.links) == (way == "mailbox")


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.samples])
async def test_ngram_sampled_text_is_the_same_over_every_link(
    pair: SimpleNamespace, client_of: Make, rule: str
) -> None:
    asked = {"rule": RULES[rule].number, "temperature": 0.5, "seed": 3}
    seen = Offered()
    found = [await texts(pair, client_of, way, seen, k=K, **asked) for way in WAYS]
    assert found[0] == found[1] == found[2]
    assert {0, 1} <= set(seen.counts) and max(seen.counts) > 1
    # Whatever is proposed, the tokens of a coupled text are the base's own.
    if not RULES[rule].needs_rows:
        assert found[0] == await texts(pair, client_of, "messages", k=0, **asked)


async def test_ngram_has_no_vocabulary_to_disagree_but_a_model_has(
    pair: SimpleNamespace, client_of: Make, tiny_base: Path
) -> None:
    # Of models that disagree: tests/coordinator/server/test_service_failures.py.
    async with client_of(pair.verify, pair.draft, tokenizer=str(pair.folder)) as client:
        info = await client.info()
    assert info.draft.vocab_size == 0 != info.base.vocab_size
    assert info.draft.vocab_fingerprint == "" != info.base.vocab_fingerprint


async def test_ngram_over_device_memory_is_refused_with_the_reason(
    pair: SimpleNamespace, client_of: Make
) -> None:
    settings = {"tokenizer": str(pair.folder), "link": "cuda-ipc"}
    with pytest.raises(ConfigError, match="'cuda-ipc' can't be had: the draft is no model"):
        async with client_of(pair.verify, pair.draft, **settings):
            pass
    async with client_of(pair.verify, pair.draft, tokenizer=str(pair.folder)) as client:
        assert (await client.info()).link == "shm"  # of itself
