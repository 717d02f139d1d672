"""What the observer is told adds up, and comes after the tokens are on their way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from outrider.coordinator.telemetry.records import (
    ConnectionRecord,
    NoObserver,
    RequestRecord,
    RoundRecord,
    WallClock,
)
from outrider_testing.clients import ask

Make = Callable[..., Any]


class Notes(NoObserver):
    """Keeps everything."""

    enabled = True
    follows = True

    def __init__(self) -> None:
        self.rounds: list[RoundRecord] = []
        self.requests: list[RequestRecord] = []
        self.connections: list[ConnectionRecord] = []
        self.started: list[tuple[str, str]] = []
        self.contexts: dict[int, str] = {}

    def traceparent(self, round_number: int, request_ids: Sequence[str]) -> str:
        self.contexts[round_number] = f"00-{round_number:032x}-{1:016x}-01"
        return self.contexts[round_number]

    def follow(self, round_number: int, request_ids: Sequence[str], traceparent: str) -> None:
        assert round_number not in self.contexts
        self.contexts[round_number] = traceparent

    def request_started(self, request_id: str, traceparent: str) -> None:
        self.started.append((request_id, traceparent))

    def round(self, record: RoundRecord) -> None:
        self.rounds.append(record)

    def request(self, record: RequestRecord) -> None:
        self.requests.append(record)

    def connection(self, record: ConnectionRecord) -> None:
        self.connections.append(record)


@pytest.mark.parametrize("link", ["grpc", "shm"])
async def test_records_add_up_to_what_the_client_saw(
    services: Make, client_of: Make, link: str
) -> None:
    base = services("verify", seconds_per_round=0.002)
    draft = services("draft", agreement=80, seconds_per_round=0.001)
    notes = Notes()

    async with client_of(base, draft, observer=notes, link=link) as client:
        requests = [
            ask([1, 2, 3], 60, k=4, temperature=0.5, seed=9),
            ask(list(range(200)), 20, k=0),
        ]
        metadata = (("traceparent", "00-abc-def-01"),)
        results = await asyncio.gather(
            *(client.generate(request, metadata=metadata) for request in requests)
        )
    assert len(notes.requests) == 2
    by_id = {record.request_id: record for record in notes.requests}
    assert sorted(notes.started) == sorted((key, "00-abc-def-01") for key in by_id)
    for result in results:
        one = result.only
        record = by_id[one.started.request_id]
        figures = one.finished.speculation
        mine = [
            part
            for whole in notes.rounds
            for part in whole.sequences
            if part.request_id == record.request_id
        ]
        assert sum(part.emitted for part in mine) == len(one.ids) == record.completion_tokens
        assert sum(part.proposed for part in mine) == figures.proposed
        assert sum(part.accepted for part in mine) == figures.accepted
        assert sum(part.rollback for part in mine) == figures.proposed - figures.accepted
        assert tuple(figures.proposed_by_position) == record.proposed_by_position
        assert tuple(figures.accepted_by_position) == record.accepted_by_position
        assert record.rounds == figures.rounds
        assert record.reason == "MAX_TOKENS"
        assert record.traceparent == "00-abc-def-01"
        assert 0 < record.arrived_ns <= record.admitted_ns <= record.first_token_ns
        assert record.first_token_ns <= record.finished_ns
        lengths = [part.committed_len for part in mine]
        assert lengths == sorted(lengths)
    for whole in notes.rounds:
        assert whole.started_ns <= whole.verify.sent_ns < whole.verify.answered_ns
        assert whole.verify.answered_ns <= whole.finished_ns
        if whole.draft.sent_ns:
            assert whole.started_ns <= whole.draft.sent_ns < whole.draft.answered_ns
            assert whole.draft.answered_ns <= whole.verify.sent_ns
            assert whole.draft.model_seconds <= whole.draft.seconds
        assert whole.verify.model_seconds <= whole.verify.seconds
        assert whole.overhead_seconds > 0
        assert whole.traceparent == notes.contexts[whole.round]
    assert [whole.round for whole in notes.rounds] == list(range(1, len(notes.rounds) + 1))


async def test_records_tell_of_lost_and_returned_services(services: Make, client_of: Make) -> None:
    base = services("verify", seconds_per_round=0.002)
    notes = Notes()

    async with client_of(base, observer=notes) as client:
        call = asyncio.create_task(client.generate(ask([1, 2], 100)))
        while base.toy.rounds < 5:
            await asyncio.sleep(0.005)
        await asyncio.to_thread(base.kill)
        base.start()
        assert (await call).only.finished
    told = [(record.service, record.up, record.sequences) for record in notes.connections]
    assert ("verify", False, 1) in told
    assert ("verify", True, 0) in told
    # One sequence, opened anew under a higher epoch.
    epochs = [part.verify_epoch for whole in notes.rounds for part in whole.sequences]
    assert epochs == sorted(epochs) and epochs[-1] > epochs[0] == 1


async def test_records_end_of_a_failed_request_has_its_status(
    services: Make, client_of: Make
) -> None:
    base = services("verify", seconds_per_round=0.002)
    notes = Notes()

    async with client_of(base, observer=notes, verify_patience_seconds=0.1) as client:
        call = asyncio.create_task(client.generate(ask([1, 2], 1000)))
        while base.toy.rounds < 5:
            await asyncio.sleep(0.005)
        await asyncio.to_thread(base.kill)
        assert (await call).error is not None
    (record,) = notes.requests
    assert record.reason == "UNAVAILABLE"
    assert "base" in record.error


def test_wall_clock_never_runs_backwards() -> None:
    clock = WallClock()
    times = [clock() for _ in range(1000)]
    assert times == sorted(times)
