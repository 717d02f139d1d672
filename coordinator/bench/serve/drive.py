"""Sends the requests of a level when they are due, and writes down what becomes of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from outrider.coordinator.bench.serve.answer import Answer, RequestFailed
from outrider.coordinator.bench.serve.traffic import PlannedRequest

LAG_INTERVAL = 0.02
"""Seconds between two looks at whether this client's own event loop keeps up."""


class Target(Protocol):
    """A server under measurement."""

    async def send(self, request: PlannedRequest, index: int, answer: Answer) -> None:
        """Streams the answer: tells ``answer`` of each message and of the counts.

        ``index`` tells requests of one level apart. Raises ``RequestFailed``.
        """

    async def describe(self) -> Mapping[str, object]:
        """What is measured: address, API, model."""


@dataclass(slots=True)
class LevelRun:
    """What one level gave; ``begin`` and ``end`` in seconds of ``time.perf_counter``.

    ``lags``: how much later than planned the client's own event loop woke, in seconds.
    """

    begin: float = 0.0
    end: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)


async def drive(
    target: Target,
    requests: Sequence[PlannedRequest],
    *,
    concurrency: int | None,
    timeout: float,
    stop: asyncio.Event,
    progress: Callable[[Sequence[Answer]], None] = lambda answers: None,
) -> LevelRun:
    """Sends ``requests``: ``concurrency`` at once, or with None each when it is due (``at``).

    A request that is due is sent, however many are still unanswered. One that takes longer than
    ``timeout`` seconds fails. When ``stop`` is set nothing more is sent, what runs is cancelled,
    and what there is so far is the result.
    """
    run = LevelRun(begin=time.perf_counter())
    lag = asyncio.create_task(_watch_lag(run, progress))
    if concurrency is None:
        work = asyncio.create_task(_on_time(target, requests, timeout, run))
    else:
        work = asyncio.create_task(_in_turn(target, requests, concurrency, timeout, run))
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((work, stopped), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (work, stopped, lag):
            task.cancel()
        await asyncio.wait((work, stopped, lag))
        run.end = time.perf_counter()
    if not work.cancelled():
        work.result()
    return run


async def _on_time(
    target: Target, requests: Sequence[PlannedRequest], timeout: float, run: LevelRun
) -> None:
    async with asyncio.TaskGroup() as group:
        for index, request in enumerate(requests):
            assert request.at is not None
            due = run.begin + request.at
            # By the clock, not one after the other: what is late does not delay the rest.
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            group.create_task(_one(target, request, index, timeout, run, due))


async def _in_turn(
    target: Target,
    requests: Sequence[PlannedRequest],
    concurrency: int,
    timeout: float,
    run: LevelRun,
) -> None:
    left: Iterator[tuple[int, PlannedRequest]] = enumerate(requests)

    async def worker() -> None:
        for index, request in left:
            await _one(target, request, index, timeout, run, None)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(requests))):
            group.create_task(worker())


async def _one(
    target: Target,
    request: PlannedRequest,
    index: int,
    timeout: float,
    run: LevelRun,
    due: float | None,
) -> None:
    answer = Answer(time.perf_counter(), due)
    run.answers.append(answer)
    try:
        async with asyncio.timeout(timeout):
            await target.send(request, index, answer)
    except TimeoutError:
        answer.failure = "timeout"
        answer.failure_message = f"no end within {timeout:g} s"
    except RequestFailed as error:
        answer.failure, answer.failure_message = error.reason, str(error)
    # A cancelled one stays without an end: it neither completed nor failed.
    answer.ended = time.perf_counter()


async def _watch_lag(run: LevelRun, progress: Callable[[Sequence[Answer]], None]) -> None:
    while True:
        due = time.perf_counter() + LAG_INTERVAL
        await asyncio.sleep(LAG_INTERVAL)
        run.lags.append(max(0.0, time.perf_counter() - due))
        progress(run.answers)
