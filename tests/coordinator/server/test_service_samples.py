"""Several samples of one prompt: the prompt is forwarded once, on either side."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from outrider.coordinator.requests.validation import derived_seed
from outrider.protos import generation_pb2 as pb
from outrider.shared.config.schema import VerifyConfig
from outrider_testing.clients import ask
from outrider_testing.model_services import start_model

Make = Callable[..., Any]
PROMPT = [(7 * i + 3) % 300 + 1 for i in range(120)]
SAMPLING = {"temperature": 0.9, "repetition_penalty": 1.2, "presence_penalty": 0.4}
ON = {"ignore_eos": True}


def free(pair: SimpleNamespace) -> bool:
    infos = [pair.verify.engine.info(), pair.draft.engine.info()]
    return all(info.sequences == info.arena_tokens_used == 0 for info in infos)


@pytest.mark.parametrize("k", [0, 3, None])
@pytest.mark.parametrize("chunk", [512, 50])
async def test_samples_equal_independent_requests_with_their_seeds(
    model_pair: SimpleNamespace, client_of: Make, k: int | None, chunk: int
) -> None:
    count = 4

    settings = {"tokenizer": str(model_pair.folder), "prefill_chunk": chunk, "prefix_cache": 0}
    async with client_of(model_pair.verify, model_pair.draft, **settings) as client:
        wanted = []
        for index in range(count):
            seed = derived_seed(7, index) if index else 7
            request = ask(PROMPT, 20, k=0, seed=seed, stopping=ON, **SAMPLING)
            wanted.append((await client.generate(request)).only.ids)
        assert len({tuple(one) for one in wanted}) == count
        for rows in (model_pair.verify.rows, model_pair.draft.rows):
            rows.clear()
        request = ask(
            PROMPT, 20, k=k, seed=7, stopping=ON, output={"num_samples": count}, **SAMPLING
        )
        result = await client.generate(request)
        assert result.error is None
        assert [result.samples[index].ids for index in range(count)] == wanted
        for one in result.samples.values():
            assert one.finished.usage.prompt_tokens == len(PROMPT)
            assert one.finished.usage.completion_tokens == 20
    assert free(model_pair)
    if k == 0:
        # The prompt once, less its last token, which each sample forwards; then a row a token.
        assert sum(model_pair.verify.rows) == len(PROMPT) - 1 + count * 20
        assert sum(model_pair.draft.rows) == 0
    elif k is not None:
        # Neither side saw the prompt twice, the draft with what was written meanwhile: what is left
        # are rows of rounds.
        assert max(model_pair.verify.rows) <= max(min(chunk, len(PROMPT)), count * (k + 1))
        assert sum(model_pair.verify.rows) < 2 * len(PROMPT) + count * 20 * (k + 1)
        large = [rows for rows in model_pair.draft.rows if rows > 2 * count * (k + 1)]
        assert sum(large) < 2 * len(PROMPT)


async def test_samples_that_end_at_once_share_too(
    model_pair: SimpleNamespace, client_of: Make
) -> None:
    async with client_of(model_pair.verify, tokenizer=str(model_pair.folder)) as client:
        model_pair.verify.rows.clear()
        request = ask(PROMPT, 1, seed=1, temperature=1.0, stopping=ON, output={"num_samples": 16})
        result = await client.generate(request)
        assert [len(one.ids) for one in result.samples.values()] == [1] * 16
        assert sum(model_pair.verify.rows) == len(PROMPT) - 1 + 16
        # A prompt of one token leaves nothing to share.
        result = await client.generate(ask([5], 3, stopping=ON, output={"num_samples": 3}))
        assert [len(one.ids) for one in result.samples.values()] == [3] * 3
    assert free(model_pair)


async def test_samples_wait_for_room_and_still_come_out_right(
    tiny_base: Path, tmp_path: Path, client_of: Make
) -> None:
    """Room for little more than one sample: the others come as the first ones go."""
    # A token takes 2 layers x 2 x 2 heads x 16 floats.
    config = VerifyConfig(
        path=str(tiny_base), device="cpu", dtype="float32", arena_bytes=512 * 200, threads=1
    )
    base = start_model("verify", config, f"unix:{tmp_path}/verify")
    assert base.engine.info().arena_tokens == 200

    try:
        async with client_of(base, tokenizer=str(tiny_base)) as client:

            def request(**parts: Any) -> pb.GenerateRequest:
                return ask(PROMPT, 20, temperature=0.9, stopping=ON, **parts)

            wanted = [
                (await client.generate(request(seed=derived_seed(3, i) if i else 3))).only.ids
                for i in range(5)
            ]
            both = await asyncio.gather(
                client.generate(request(seed=3, output={"num_samples": 5})),
                client.generate(request(seed=3)),
            )
            assert [both[0].samples[i].ids for i in range(5)] == wanted
            assert both[1].only.ids == wanted[0]
        assert base.engine.info().arena_tokens_used == 0
    finally:
        base.server.drain(grace=0)


async def test_samples_survive_a_base_that_dies_and_comes_back(
    tiny_base: Path, tmp_path: Path, client_of: Make
) -> None:
    config = VerifyConfig(
        path=str(tiny_base), device="cpu", dtype="float32", arena_bytes=8 << 20, threads=1
    )
    base = start_model("verify", config, f"unix:{tmp_path}/verify")

    try:
        async with client_of(base, tokenizer=str(tiny_base)) as client:
            request = ask(
                PROMPT, 150, seed=4, temperature=0.8, stopping=ON, output={"num_samples": 3}
            )
            whole = await client.generate(request)
            call = asyncio.create_task(client.generate(request))
            while sum(base.rows) < 2 * len(PROMPT) + 3 * 150:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(base.server.drain, grace=0)
            base = await asyncio.to_thread(start_model, "verify", config, base.listen)
            again = await call
            assert again.error is None
            assert {i: one.ids for i, one in again.samples.items()} == {
                i: one.ids for i, one in whole.samples.items()
            }
            assert sum(base.rows) > 0  # it was needed again
    finally:
        base.server.drain(grace=0)


async def test_a_cancelled_request_frees_all_its_samples(
    model_pair: SimpleNamespace, client_of: Make
) -> None:
    settings = {"tokenizer": str(model_pair.folder)}
    async with client_of(model_pair.verify, model_pair.draft, **settings) as client:
        request = ask(PROMPT, 700, k=2, stopping=ON, output={"num_samples": 4})
        call = client.stub.Generate(request)
        async for message in call:
            if message.HasField("delta"):
                break
        call.cancel()
        async with asyncio.timeout(20):
            while not free(model_pair):
                await asyncio.sleep(0.02)
