"""Models whose rotary embedding depends on the length of the sequence, through the coordinator."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from outrider.shared.config.schema import DraftConfig, VerifyConfig
from outrider_testing import engines
from outrider_testing.architectures import BORDER, LENGTHS, tiny
from outrider_testing.clients import ask
from outrider_testing.model_services import start_model

COUNT = 28
LENGTHS_OF_PROMPTS = (3, 10, BORDER - 1, BORDER, BORDER + 1, 50)
CHUNK = 7


@pytest.fixture(scope="module", params=LENGTHS)
def pair(request: Any, tmp_path_factory: Any, tiny_base: Path) -> Iterator[SimpleNamespace]:
    """Base, a draft that is often right, and the base itself."""
    kind, changes = LENGTHS[request.param]
    model = tiny(kind, changes)
    folder = tmp_path_factory.mktemp("lengths")
    model.save_pretrained(folder / "base")
    options = {"device": "cpu", "arena_bytes": 16 << 20, "threads": 1, "prefill_chunk": 16}
    verify = start_model(
        "verify", VerifyConfig(path=str(folder / "base"), **options), f"unix:{folder}/v"
    )
    draft = start_model(
        "draft", DraftConfig(path=str(folder / "base"), **options), f"unix:{folder}/d"
    )
    prompts = [engines.prompts(1, seed=n, shortest=n, longest=n)[0] for n in LENGTHS_OF_PROMPTS]
    wanted = [engines.reference(model, prompt, COUNT) for prompt in prompts]
    yield SimpleNamespace(
        verify=verify, draft=draft, prompts=prompts, wanted=wanted, tokenizer=str(tiny_base)
    )
    draft.server.drain(grace=0)
    verify.server.drain(grace=0)


@pytest.mark.parametrize("grant_rounds", [0, 64])
async def test_text_across_the_border_is_that_of_generate(
    pair: SimpleNamespace, client_of: Callable[..., Any], grant_rounds: int
) -> None:
    """Whatever K and chunk; alone, and with short and long sequences in one batch."""
    settings = {"tokenizer": pair.tokenizer, "prefill_chunk": CHUNK, "grant_rounds": grant_rounds}
    async with client_of(pair.verify, pair.draft, **settings) as client:
        for k in (0, 1, 5):
            together = await asyncio.gather(
                *(
                    client.generate(ask(prompt, COUNT, k=k, stopping={"ignore_eos": True}))
                    for prompt in pair.prompts
                )
            )
            assert [one.only.ids for one in together] == pair.wanted
        alone = ask(pair.prompts[1], COUNT, k=4, stopping={"ignore_eos": True})
        assert (await client.generate(alone)).only.ids == pair.wanted[1]


async def test_text_resumed_across_the_border_goes_on_as_it_was(
    pair: SimpleNamespace, client_of: Callable[..., Any]
) -> None:
    settings = {"tokenizer": pair.tokenizer, "prefill_chunk": CHUNK}
    async with client_of(pair.verify, pair.draft, **settings) as client:
        for cut in (5, 14, 15, 25):
            prompt, wanted = pair.prompts[1], pair.wanted[1]
            stopping = {"ignore_eos": True}
            asked = ask(prompt, COUNT, k=3, resume=wanted[:cut], stopping=stopping)
            assert (await client.generate(asked)).only.ids == wanted[cut:]


async def test_samples_across_the_border_are_those_of_their_seeds(
    pair: SimpleNamespace, client_of: Callable[..., Any]
) -> None:
    """They share their prompt up to there, if at all."""
    settings = {"tokenizer": pair.tokenizer, "prefill_chunk": CHUNK}
    sampling: dict[str, Any] = {"temperature": 0.9, "stopping": {"ignore_eos": True}}
    async with client_of(pair.verify, pair.draft, **settings) as client:
        asked = ask(pair.prompts[1], COUNT, k=3, seed=5, output={"num_samples": 3}, **sampling)
        for sample in (await client.generate(asked)).samples.values():
            seed = sample.finished.seed
            alone = await client.generate(ask(pair.prompts[1], COUNT, k=0, seed=seed, **sampling))
            assert alone.only.ids == sample.ids
            assert len(sample.ids) == COUNT
