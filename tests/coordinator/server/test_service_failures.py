"""Services that die, hang, refuse and come back: the tokens are those of an undisturbed run."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from outrider.coordinator.telemetry.records import ConnectionRecord, NoObserver
from outrider.shared.core.errors import RefusalCode, SequenceRefused, VocabularyMismatch
from outrider.shared.core.types import Decoding, Refusal
from outrider_testing import fakes
from outrider_testing.clients import ask
from outrider_testing.waiting import until

Make = Callable[..., Any]
PROMPT = [5, 6, 7, 8]


class Connections(NoObserver):
    """Keeps which services were lost, and which came back."""

    follows = True

    def __init__(self) -> None:
        self.seen: list[tuple[str, bool]] = []

    def connection(self, record: ConnectionRecord) -> None:
        self.seen.append((record.service, record.up))


async def rounds_more(toy: Any, count: int) -> None:
    """Waits until the service has run more than ``count`` rounds from now."""
    before = toy.rounds
    await until(lambda: toy.rounds > before + count)


@pytest.mark.parametrize("seed", range(3))
async def test_failures_draft_killed_in_mid_stream_changes_no_token(
    services: Make, client_of: Make, seed: int
) -> None:
    base = services("verify", seconds_per_round=0.02)  # slow, so that there is a mid-stream
    draft = services("draft", agreement=90)
    rng = random.Random(seed)

    async with client_of(base, draft) as client:
        call = asyncio.create_task(client.generate(ask(PROMPT, 600, k=4)))
        for _ in range(2):
            await rounds_more(draft.toy, rng.randrange(8))
            await asyncio.to_thread(draft.kill)
            await rounds_more(base.toy, 5)  # it goes on without
            draft.start()
        await rounds_more(draft.toy, 3)  # speculation resumed after each return
        base.toy.seconds_per_round = 0.0
        one = (await call).only
        assert one.ids == fakes.plain(PROMPT, 600)
        assert one.finished.speculation.accepted > 0
    assert base.toy.live == draft.toy.live == 0


@pytest.mark.parametrize("seed", range(3))
async def test_failures_verifier_killed_in_mid_stream_changes_no_token(
    services: Make, client_of: Make, seed: int
) -> None:
    base = services("verify", seconds_per_round=0.002)
    draft = services("draft", agreement=60)
    rng = random.Random(seed)

    async with client_of(base, draft) as client:
        asks = [ask([1 + i, 2, 3], 150, k=k) for i, k in enumerate((0, 3, None))]
        calls = [asyncio.create_task(client.generate(one)) for one in asks]
        for _ in range(2):
            await rounds_more(base.toy, rng.randrange(1, 10))
            await asyncio.to_thread(base.kill)
            await asyncio.sleep(0.05)
            base.start()
        for i, call in enumerate(calls):
            assert (await call).only.ids == fakes.plain([1 + i, 2, 3], 150)
    assert len({one.epoch for one in base.toy.opened}) >= 3  # opened anew, under new epochs
    assert base.toy.live == draft.toy.live == 0


async def test_failures_verifier_away_for_too_long_fails_requests_as_unavailable(
    services: Make, client_of: Make
) -> None:
    base = services("verify", seconds_per_round=0.005)

    async with client_of(base, verify_patience_seconds=2.0) as client:
        call = asyncio.create_task(client.generate(ask(PROMPT, 2000)))
        await until(lambda: base.toy.rounds > 3)
        await asyncio.to_thread(base.kill)
        result = await call
        assert result.error.code() is grpc.StatusCode.UNAVAILABLE
        assert "base" in result.error.details()
        # The next one is told at once.
        started = time.monotonic()
        result = await client.generate(ask(PROMPT, 5))
        assert result.error.code() is grpc.StatusCode.UNAVAILABLE
        assert time.monotonic() - started < 1.0
        base.start()

        async def served() -> bool:
            result = await client.generate(ask(PROMPT, 5))
            return result.error is None and result.only.ids == fakes.plain(PROMPT, 5)

        await until(served)


async def test_failures_hung_draft_is_not_waited_for(services: Make, client_of: Make) -> None:
    base, draft = services("verify"), services("draft")
    links = Connections()

    async def of_use() -> bool:
        one = (await client.generate(ask(PROMPT, 60, k=4))).only
        assert one.ids == fakes.plain(PROMPT, 60)
        return bool(one.finished.speculation.accepted)

    settings = {"draft_patience_seconds": 0.1, "draft_timeout_seconds": 3.0}
    async with client_of(base, draft, links, **settings) as client:
        gate = draft.toy.stand()
        assert not await of_use()
        assert gate.reached.is_set() and not links.seen, "it was waited for until it was given up"
        # It answers late, and is of use again.
        gate.set()
        await until(of_use)
        # It hangs for longer than its timeout: the stream is given up and made anew.
        gate = draft.toy.stand()
        assert not await of_use()
        await until(lambda: ("draft", False) in links.seen)
        gate.set()
        draft.toy.hold = None
        await until(of_use)


async def test_failures_hung_verifier_is_given_up_and_tried_again(
    services: Make, client_of: Make
) -> None:
    base = services("verify", seconds_per_round=0.002)

    links = Connections()

    async with client_of(base, observer=links, verify_timeout_seconds=0.3) as client:
        call = asyncio.create_task(client.generate(ask(PROMPT, 100)))
        await until(lambda: base.toy.rounds > 5)
        gate = base.toy.stand()
        await until(gate.reached.is_set)
        await until(lambda: ("verify", False) in links.seen)
        base.toy.hold = None
        gate.set()
        assert (await call).only.ids == fakes.plain(PROMPT, 100)


@pytest.mark.parametrize(
    "code", [RefusalCode.UNKNOWN, RefusalCode.STALE_EPOCH, RefusalCode.KV_MISSING]
)
@pytest.mark.parametrize("role", ["draft", "verify"])
async def test_failures_refusals_are_healed_from_the_log(
    services: Make, client_of: Make, role: str, code: RefusalCode
) -> None:
    both = {"verify": services("verify"), "draft": services("draft", agreement=90)}
    rng = random.Random(4)

    def refuse(item: Any) -> Refusal | None:
        if rng.random() < 0.1:
            held = min(item.base_len, 2)
            return Refusal(item.sequence_id, item.epoch, code, "made up", held)
        return None

    both[role].toy.refuse = refuse

    async with client_of(both["verify"], both["draft"]) as client:
        one = (await client.generate(ask(PROMPT, 200, k=4))).only
        assert one.ids == fakes.plain(PROMPT, 200)
        assert one.finished.speculation.accepted > 0
    assert both["verify"].toy.live == both["draft"].toy.live == 0


async def test_failures_one_sequence_of_the_model_fails_alone(
    services: Make, client_of: Make
) -> None:
    base = services("verify")

    def refuse(item: Any) -> Refusal | None:
        if item.base_len > 20 and item.append[0] in fakes.plain([66, 66], 60):
            bad = bases.setdefault("bad", item.sequence_id)
            if item.sequence_id == bad:
                return Refusal(item.sequence_id, item.epoch, RefusalCode.MODEL, "logits are NaN")
        return None

    bases: dict[str, int] = {}

    async with client_of(base) as client:
        bad = asyncio.create_task(client.generate(ask([66, 66], 60)))
        await until(lambda: base.toy.rounds > 0)
        base.toy.refuse = refuse
        good = asyncio.create_task(client.generate(ask(PROMPT, 60)))
        result = await bad
        assert result.error.code() is grpc.StatusCode.INTERNAL
        assert "logits are NaN" in result.error.details()
        assert (await good).only.ids == fakes.plain(PROMPT, 60)
    assert base.toy.live == 0


async def test_failures_broken_draft_model_only_costs_speed(
    services: Make, client_of: Make
) -> None:
    base, draft = services("verify"), services("draft")
    draft.toy.refuse = lambda item: Refusal(
        item.sequence_id, item.epoch, RefusalCode.MODEL, "logits are NaN"
    )

    async with client_of(base, draft) as client:
        one = (await client.generate(ask(PROMPT, 60, k=4))).only
        assert one.ids == fakes.plain(PROMPT, 60)
        assert one.finished.speculation.proposed == 0
        # It was asked a few times, then no more.
        assert len(draft.toy.items) < 20


async def test_failures_draft_without_room_only_costs_speed(
    services: Make, client_of: Make
) -> None:
    base = services("verify", seconds_per_round=0.001)
    draft = services("draft", arena_tokens=150)  # room for one

    async with client_of(base, draft) as client:
        results = await asyncio.gather(
            *(client.generate(ask([i, 2, 3], 100, k=4)) for i in range(3))
        )
        for i, result in enumerate(results):
            assert result.only.ids == fakes.plain([i, 2, 3], 100)
        proposed = [result.only.finished.speculation.proposed for result in results]
        assert max(proposed) > 0
    assert draft.toy.live == 0


async def test_failures_draft_of_another_vocabulary_is_refused_with_both_fingerprints(
    services: Make, client_of: Make
) -> None:
    base, draft = services("verify"), services("draft", fingerprint="0" * 64)

    with pytest.raises(VocabularyMismatch) as error:
        async with client_of(base, draft):
            pass
    assert "f" * 64 in str(error.value)
    assert "0" * 64 in str(error.value)
    assert "--no-draft" in str(error.value)


async def test_failures_draft_that_returns_with_another_vocabulary_is_not_used(
    services: Make, client_of: Make, caplog: pytest.LogCaptureFixture
) -> None:
    base, draft = services("verify"), services("draft")

    async with client_of(base, draft) as client:
        await asyncio.to_thread(draft.kill)
        draft.toy.fingerprint = "0" * 64
        draft.start()
        await until(lambda: "fingerprint" in caplog.text)
        one = (await client.generate(ask(PROMPT, 40, k=4))).only
        assert one.ids == fakes.plain(PROMPT, 40)
        assert one.finished.speculation.proposed == 0
        assert not (await client.info()).HasField("draft")


async def test_failures_protocol_of_another_version_is_refused(
    services: Make, client_of: Make
) -> None:
    base = services("verify")

    original = base.toy.protocol
    try:
        from outrider.shared.core import wire

        monkey = pytest.MonkeyPatch()
        monkey.setattr(wire, "PROTOCOL", original + 1)
        with pytest.raises(Exception, match="protocol"):
            async with client_of(base, start_timeout_seconds=0.5):
                pass
    finally:
        monkey.undo()


async def test_failures_base_that_is_not_there_is_told(services: Make, client_of: Make) -> None:
    base = services("verify")
    base.kill()

    with pytest.raises(Exception, match="can't be reached"):
        async with client_of(base, start_timeout_seconds=0.3):
            pass


async def test_failures_another_base_in_its_place_is_refused(
    services: Make, client_of: Make
) -> None:
    base = services("verify", seconds_per_round=0.005)

    async with client_of(base, verify_patience_seconds=0.5) as client:
        call = asyncio.create_task(client.generate(ask(PROMPT, 2000)))
        await until(lambda: base.toy.rounds > 3)
        await asyncio.to_thread(base.kill)
        base.toy.fingerprint = "0" * 64
        base.start()
        result = await call
        assert result.error.code() is grpc.StatusCode.UNAVAILABLE
        assert "another model" in result.error.details()


async def test_failures_room_that_others_hold_is_waited_for(
    services: Make, client_of: Make
) -> None:
    base = services("verify")
    taken, refused = True, 0

    def refuse(_: Any) -> SequenceRefused | None:
        nonlocal refused
        refused += taken
        return SequenceRefused(RefusalCode.NO_CAPACITY, "full") if taken else None

    base.toy.refuse_open = refuse

    async with client_of(base) as client:
        call = asyncio.create_task(client.generate(ask(PROMPT, 10)))
        await until(lambda: refused > 3)
        assert not call.done()
        assert (await client.info()).waiting == 1
        taken = False
        assert (await call).only.ids == fakes.plain(PROMPT, 10)


@pytest.mark.parametrize("role", ["verify", "draft"])
async def test_failures_sequence_that_a_service_denies_is_closed_there(
    services: Make, client_of: Make, role: str
) -> None:
    base, draft = services("verify"), services("draft")
    # From here on it says that it does not know what it holds.
    denying = {"verify": base, "draft": draft}[role].toy
    denying.refuse = lambda item: Refusal(
        item.sequence_id, item.epoch, RefusalCode.UNKNOWN, "made up", 0
    )

    async with client_of(base, draft) as client:
        result = await client.generate(ask(PROMPT, 10, k=4))
        if role == "draft":
            assert result.only.ids == fakes.plain(PROMPT, 10)
        else:
            assert "made up" in result.error.details()
        assert denying.opened
        await until(lambda: base.toy.live == draft.toy.live == 0)


@pytest.mark.parametrize("seed", range(4))
async def test_failures_of_all_kinds_at_once_change_no_token(
    services: Make, client_of: Make, seed: int
) -> None:
    rng = random.Random(seed)
    base = services("verify", arena_tokens=900, seconds_per_round=0.0005)
    draft = services("draft", arena_tokens=700, agreement=85)
    codes = [RefusalCode.UNKNOWN, RefusalCode.STALE_EPOCH, RefusalCode.KV_MISSING]

    def refuse(item: Any) -> Refusal | None:
        if rng.random() < 0.03:
            code = rng.choice(codes)
            held = rng.randrange(item.base_len + 1)
            return Refusal(item.sequence_id, item.epoch, code, "made up", held)
        return None

    base.toy.refuse = draft.toy.refuse = refuse

    async def trouble() -> None:
        while True:
            await asyncio.sleep(rng.uniform(0.02, 0.15))
            one = rng.choice([base, draft])
            await asyncio.to_thread(one.kill)
            await asyncio.sleep(rng.uniform(0, 0.05))
            one.start()

    async def one(client: Any, i: int) -> None:
        prompt = [rng.randrange(300) for _ in range(rng.choice([2, 30, 100]))]
        count = rng.randrange(20, 120)
        request = ask(prompt, count, k=rng.choice([0, 2, 5, None]), temperature=0.7, seed=i)
        await asyncio.sleep(rng.uniform(0, 0.3))
        if rng.random() < 0.2:
            call = client.stub.Generate(request)
            await asyncio.sleep(rng.uniform(0, 0.2))
            call.cancel()
            return
        result = await client.generate(request)
        decoding = Decoding(temperature=0.7, seed=i)
        assert result.only.ids == fakes.plain(prompt, count, decoding)

    async with client_of(base, draft, prefill_chunk=32) as client:
        troubles = asyncio.create_task(trouble())
        await asyncio.gather(*(one(client, i) for i in range(24)))
        troubles.cancel()
        await asyncio.gather(troubles, return_exceptions=True)
        for service in (base, draft):
            if service._server is None:
                service.start()
        info = await client.info()
        assert (info.running, info.waiting) == (0, 0)
        await until(lambda: base.toy.live == draft.toy.live == 0)
    assert base.toy.used == draft.toy.used == 0
