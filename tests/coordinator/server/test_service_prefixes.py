"""Prompts that begin like other sequences: what they take over, and that it changes no token."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from outrider.coordinator.telemetry.records import NoObserver, RoundRecord
from outrider_testing import engines, fakes
from outrider_testing.clients import ask
from outrider_testing.waiting import until

Make = Callable[..., Any]
PROMPT = [(7 * i + 3) % 97 + 1 for i in range(150)]
ON = {"ignore_eos": True}


class Rounds(NoObserver):
    """Keeps the records of rounds."""

    enabled = True

    def __init__(self) -> None:
        self.seen: list[RoundRecord] = []

    def round(self, record: RoundRecord) -> None:
        self.seen.append(record)


async def second_turn(client: Any, prompt: list[int], **parts: Any) -> tuple[list[int], Any]:
    """Has a first turn written; the prompt of the second, and what came of it."""
    first = (await client.generate(ask(prompt, 20, stopping=ON, **parts))).only
    turn = [*prompt, *first.ids, 11, 12, 13]
    return turn, (await client.generate(ask(turn, 20, stopping=ON, **parts))).only


@pytest.mark.parametrize("k", [0, 3])
async def test_prefixes_of_a_second_turn_are_taken_over_on_both_sides(
    services: Make, client_of: Make, k: int
) -> None:
    base, draft = services("verify"), services("draft", agreement=100)
    seen = Rounds()
    async with client_of(base, draft, seen) as client:
        turn, second = await second_turn(client, PROMPT, k=k)
        assert second.ids == fakes.plain(turn, 20)
        # All but the first turn's last token, whose KV was never needed.
        wanted = len(PROMPT) + 19
        assert second.finished.usage.cached_prompt_tokens == wanted
        assert second.finished.usage.prompt_tokens == len(turn)
        assert base.toy.hits == [wanted]
        assert len(draft.toy.hits) == (k > 0)
        assert all(length > len(PROMPT) for length in draft.toy.hits)
        info = await client.info()
        assert (info.base_cache.hits, info.base_cache.hit_tokens) == (1, wanted)
        assert info.draft_cache.hits == (k > 0)
        assert (info.running, info.base.arena_tokens_used) == (0, 0)
        # The first turn is part of the second.
        assert info.base_cache.sequences == 1
        assert info.base_cache.tokens == info.base.arena_tokens_cached == len(turn) + 19
    rows = [record.verify.rows for record in seen.seen]
    assert rows.count(4) + rows.count(len(PROMPT)) >= 2
    assert sum(rows) < len(PROMPT) + 4 + 40 * (k + 1)
    assert base.toy.live == 0 and not base.toy.cached and not draft.toy.cached


async def test_prefixes_of_running_sequences_are_taken_over(
    services: Make, client_of: Make
) -> None:
    base = services("verify", seconds_per_round=0.005)
    async with client_of(base) as client:
        long = asyncio.create_task(client.generate(ask(PROMPT, 300)))
        await until(lambda: base.toy.rounds > 5)
        prompt = [*PROMPT, 5, 5]
        other = (await client.generate(ask(prompt, 10))).only
        assert not long.done()
        base.toy.seconds_per_round = 0.0
        assert (await long).only.ids == fakes.plain(PROMPT, 300)
        assert other.ids == fakes.plain(prompt, 10)
        assert other.finished.usage.cached_prompt_tokens == len(PROMPT)


async def test_prefixes_are_not_shared_between_salts(services: Make, client_of: Make) -> None:
    base = services("verify")
    async with client_of(base) as client:
        for salt in ("", "a", "b" * 256):
            one = (await client.generate(ask(PROMPT, 5, salt=salt))).only
            assert one.finished.usage.cached_prompt_tokens == 0
        for salt in ("", "a"):
            one = (await client.generate(ask(PROMPT, 5, salt=salt))).only
            assert one.finished.usage.cached_prompt_tokens == len(PROMPT) - 1
        refused = await client.generate(ask(PROMPT, 5, salt="b" * 257))
        assert refused.error is not None
        assert refused.error.code() == grpc.StatusCode.INVALID_ARGUMENT
        details = refused.error.details() or ""
        assert all(word in details for word in ("cache_salt", "257", "256"))


async def test_prefixes_are_not_taken_over_where_the_cache_is_off(
    services: Make, client_of: Make
) -> None:
    base = services("verify")
    async with client_of(base, prefix_cache=0) as client:
        turn, second = await second_turn(client, PROMPT)
        assert second.ids == fakes.plain(turn, 20)
        assert second.finished.usage.cached_prompt_tokens == 0
        info = await client.info()
        assert not info.HasField("base_cache")
        await until(lambda: base.toy.live == 0)
        assert not base.toy.cached


async def test_prefixes_cached_keep_nobody_out(services: Make, client_of: Make) -> None:
    """Neither this coordinator's requests nor another's are refused room for their sake."""
    base = services("verify", arena_tokens=1000)
    mine, yours = Rounds(), Rounds()
    async with (
        client_of(base, observer=mine) as client,
        client_of(base, observer=yours) as other,
    ):
        for number in range(6):
            prompt = [number + 1, *PROMPT]
            assert (await client.generate(ask(prompt, 20))).only.ids == fakes.plain(prompt, 20)
        await until(lambda: len(base.toy.cached) == 5)
        whole = 1000 - len(PROMPT) - 17
        assert (await other.generate(ask(PROMPT, whole))).only.ids == fakes.plain(PROMPT, whole)
        prompt = [77, *PROMPT]
        assert (await client.generate(ask(prompt, whole - 1))).error is None
        info = await client.info()
        assert info.base_cache.evictions == 6
        assert info.base_cache.sequences == len(base.toy.cached) == 1
    assert not any(one.refused for record in (*mine.seen, *yours.seen) for one in record.sequences)


async def test_prefixes_that_the_service_has_lost_are_taken_in_anew(
    services: Make, client_of: Make
) -> None:
    base, draft = services("verify"), services("draft", agreement=100)
    async with client_of(base, draft) as client:
        first = (await client.generate(ask(PROMPT, 20, k=3))).only
        await until(lambda: len(base.toy.cached) == len(draft.toy.cached) == 1)
        base.toy.cached.clear()
        draft.toy.cached.clear()
        turn = [*PROMPT, *first.ids, 9]
        base.toy.seconds_per_round = 0.002  # so that there is time for the draft to come near
        second = (await client.generate(ask(turn, 200, k=3))).only
        assert second.ids == fakes.plain(turn, 200)
        assert second.finished.usage.cached_prompt_tokens == 0
        assert second.finished.speculation.accepted > 0
        assert (await client.info()).base_cache.hits == 0


async def test_prefixes_are_gone_with_the_services(services: Make, client_of: Make) -> None:
    base, draft = services("verify"), services("draft", agreement=100)
    async with client_of(base, draft) as client:
        turn, _ = await second_turn(client, PROMPT, k=3)
        for service in (base, draft):
            await asyncio.to_thread(service.kill)
            service.start()
        await until(lambda: not base.toy.cached and not draft.toy.cached)
        async with asyncio.timeout(20):
            while (await client.info()).base_cache.sequences:
                await asyncio.sleep(0.02)
        again = (await client.generate(ask(turn, 20, k=3))).only
        assert again.ids == fakes.plain(turn, 20)
        assert again.finished.usage.cached_prompt_tokens == 0
        third = (await client.generate(ask([*turn, *again.ids], 20, k=3))).only
        assert third.finished.usage.cached_prompt_tokens == len(turn) + 19


@pytest.mark.parametrize("count", [1, 10])
async def test_prefixes_serve_samples_too(
    model_pair: SimpleNamespace, client_of: Make, count: int
) -> None:
    """The first takes over what was there; the others have the first one's prompt."""
    prompt = [*PROMPT, 4, 4]
    request = ask(
        prompt, count, k=0, temperature=0.7, seed=3, stopping=ON, output={"num_samples": 3}
    )
    settings = {"tokenizer": str(model_pair.folder)}
    async with client_of(model_pair.verify, prefix_cache=0, **settings) as client:
        plain = await client.generate(request)
    async with client_of(model_pair.verify, **settings) as client:
        await client.generate(ask(PROMPT, 5, stopping=ON))
        model_pair.verify.rows.clear()
        result = await client.generate(request)
        assert result.error is None
        cached = [one.finished.usage.cached_prompt_tokens for one in result.samples.values()]
        assert cached == [len(PROMPT), len(prompt) - 1, len(prompt) - 1]
        assert sum(model_pair.verify.rows) == 1 + 3 * count
    assert [one.ids for one in result.samples.values()] == [
        one.ids for one in plain.samples.values()
    ]
    assert model_pair.verify.engine.runner.arena.used == 0


@pytest.mark.parametrize("seed", range(3))
async def test_prefixes_change_no_token_whatever_happens(
    services: Make, client_of: Make, seed: int
) -> None:
    """Shared beginnings, cancellations, little room, services that die: the tokens are plain's."""
    base = services("verify", arena_tokens=1500)
    draft = services("draft", arena_tokens=1200, agreement=80)
    chance = random.Random(seed)
    known = [PROMPT, [1, *PROMPT], PROMPT[:70]]

    async def one(client: Any) -> None:
        begin = chance.choice(known)
        prompt = [*begin[: chance.randint(1, len(begin))], *range(chance.randint(1, 40))]
        count, k = chance.randint(1, 60), chance.choice([0, 2, None])
        request = ask(prompt, count, k=k, salt=chance.choice(["", "", "other"]))
        if chance.random() < 0.3:
            call = client.stub.Generate(request)
            async for _ in call:
                break
            call.cancel()
            return
        result = (await client.generate(request)).only
        assert result.ids == fakes.plain(prompt, count)
        known.append([*prompt, *result.ids])

    async def trouble() -> None:
        for service in (draft, base, draft):
            await asyncio.sleep(0.15)
            await asyncio.to_thread(service.kill)
            service.start()

    async with client_of(base, draft, prefix_cache=6) as client:
        many = [client for _ in range(60)]
        troubled = asyncio.create_task(trouble())
        while many:
            await asyncio.gather(*(one(many.pop()) for _ in range(chance.randint(1, 5)) if many))
        await troubled
        await client.generate(ask([1], 1))
        async with asyncio.timeout(20):
            while base.toy.live or draft.toy.live:
                await asyncio.sleep(0.01)
        info = await client.info()
        assert info.base_cache.hits > 0
        assert info.base_cache.sequences == len(base.toy.cached) <= 6
        assert info.draft_cache.sequences == len(draft.toy.cached)
    assert not base.toy.cached and not draft.toy.cached and base.toy.used == draft.toy.used == 0


@pytest.mark.parametrize("k", [0, 3])
async def test_prefixes_taken_over_give_what_transformers_writes(
    model_pair: SimpleNamespace, client_of: Make, k: int
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(model_pair.folder)).eval()
    async with client_of(
        model_pair.verify, model_pair.draft, tokenizer=str(model_pair.folder)
    ) as client:
        prompt, turns = list(PROMPT), []
        for number in range(4):
            made = (await client.generate(ask(prompt, 24, k=k, stopping=ON))).only
            assert made.ids == engines.reference(model, prompt, 24)
            turns.append(made.finished.usage.cached_prompt_tokens)
            prompt = [*prompt, *made.ids, number + 1, 5, 6]
            model_pair.verify.rows.clear()
        assert turns[1:] == [150 + 23, 177 + 23, 204 + 23]
    for one in (model_pair.verify, model_pair.draft):
        info = one.engine.info()
        assert (info.cached, info.arena_tokens_cached, info.arena_tokens_used) == (0, 0, 0)
        assert one.engine.runner.arena.used == 0
