"""Requests are sent when they are due, or so many at once; what becomes of them is kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

import pytest

from outrider.coordinator.bench.serve.answer import Answer, RequestFailed
from outrider.coordinator.bench.serve.drive import LevelRun, drive
from outrider.coordinator.bench.serve.traffic import PlannedRequest

LONG = 60.0


class Scripted:
    """A target that does what ``act`` does with the request's number."""

    def __init__(self, act: Callable[[int], Awaitable[None]]) -> None:
        self.act = act
        self.sent: list[int] = []
        self.running = self.most = 0

    async def send(self, request: PlannedRequest, index: int, answer: Answer) -> None:
        self.sent.append(index)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.act(index)
            answer.message()
        finally:
            self.running -= 1

    async def describe(self) -> Mapping[str, object]:
        return {}


def requests(*at: float | None) -> list[PlannedRequest]:
    return [PlannedRequest((1,), 1, one) for one in at]


async def driven(
    target: Scripted,
    planned: list[PlannedRequest],
    concurrency: int | None = None,
    *,
    timeout: float = LONG,
    stop: asyncio.Event | None = None,
) -> LevelRun:
    return await drive(
        target, planned, concurrency=concurrency, timeout=timeout, stop=stop or asyncio.Event()
    )


async def test_open_arrivals_wait_for_no_answer() -> None:
    everybody = asyncio.Event()

    async def act(index: int) -> None:
        if len(target.sent) == 20:
            everybody.set()
        await everybody.wait()  # no answer before the last request is there

    target = Scripted(act)
    run = await driven(target, requests(*(0.001 * n for n in range(20))))
    assert target.most == 20 and target.sent == list(range(20))
    assert all(one.completed for one in run.answers)


async def test_open_arrivals_are_by_the_clock_and_lateness_is_kept() -> None:
    async def act(index: int) -> None:
        if index == 0:
            time.sleep(0.1)  # noqa: ASYNC251 - a client that is held up

    run = await driven(Scripted(act), requests(0.0, 0.02, 0.3))
    held, late, later = run.answers
    assert [one.due - run.begin for one in run.answers if one.due is not None] == pytest.approx(
        [0.0, 0.02, 0.3]
    )
    assert all(one.due is not None and one.sent >= one.due for one in (held, late, later))
    # Held up for 0.1 s, and said so: by the request, and by the client's own loop.
    assert late.due is not None and late.sent - late.due >= 0.07
    assert max(run.lags) >= 0.07


async def test_concurrency_is_kept_full_and_never_exceeded() -> None:
    gate = asyncio.Semaphore(0)

    async def act(index: int) -> None:
        # Nobody goes on before four are here; the last three can't be more than they are.
        if target.running == 4 or index > 16:
            gate.release()
        await gate.acquire()
        gate.release()

    target = Scripted(act)
    run = await driven(target, requests(*[None] * 20), 4)
    assert target.most == 4 and sorted(target.sent) == list(range(20))
    assert len(run.answers) == 20 and all(one.due is None for one in run.answers)


async def test_failures_are_kept_with_their_reason_and_the_rest_goes_on() -> None:
    async def act(index: int) -> None:
        if index == 1:
            raise RequestFailed("HTTP 503", "busy")
        if index == 2:
            await asyncio.Event().wait()

    run = await driven(Scripted(act), requests(*[None] * 5), 1, timeout=0.3)
    assert [one.failure for one in run.answers] == [None, "HTTP 503", "timeout", None, None]
    assert run.answers[1].failure_message == "busy"
    assert run.answers[2].ended is not None and run.answers[2].e2e >= 0.3


@pytest.mark.parametrize("concurrency", [None, 3])
async def test_stop_ends_what_runs_and_sends_nothing_more(concurrency: int | None) -> None:
    stop = asyncio.Event()

    async def act(index: int) -> None:
        if index == 4:
            stop.set()
        if index >= 2:
            await asyncio.Event().wait()

    target = Scripted(act)
    planned = requests(0, 0, 0, 0, 0, LONG, LONG)
    run = await driven(target, planned, concurrency, stop=stop)
    assert target.sent == [0, 1, 2, 3, 4] and target.running == 0
    assert [one.completed for one in run.answers] == [True, True, False, False, False]
    assert all(one.ended is None and one.failure is None for one in run.answers[2:])


async def test_an_unforeseen_error_is_not_swallowed() -> None:
    async def act(index: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as caught:
        await driven(Scripted(act), requests(None), 1)
    assert caught.group_contains(ZeroDivisionError)


async def test_progress_is_told_of_all_requests_so_far() -> None:
    seen: list[int] = []
    told = asyncio.Event()

    async def act(index: int) -> None:
        if index == 1:
            await told.wait()

    def progress(answers: object) -> None:
        assert isinstance(answers, list)
        seen.append(len(answers))
        if len(answers) == 2:
            told.set()

    await drive(
        Scripted(act), requests(None, None), concurrency=1, timeout=LONG, stop=asyncio.Event(),
        progress=progress,
    )  # fmt: skip
    assert seen[-1] == 2
