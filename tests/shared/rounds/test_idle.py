"""Work of an engine that nobody is to wait for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from outrider.shared.rounds.idle import IDLE_SECONDS, IdleWork
from outrider_testing.waiting import soon


class IdleEngine:
    """Has some pieces of work to do."""

    def __init__(self, pieces: int, used_at: float = 0.0) -> None:
        self.lock = threading.RLock()
        self.used_at = used_at
        self.done = 0
        self.pieces = pieces
        self.runner = SimpleNamespace(between=self._between)
        self.waited = 0

    def give_way(self) -> None:
        self.waited += 1

    def _between(self) -> bool:
        if self.done == self.pieces:
            return False
        self.done += 1
        return True


@pytest.fixture
def started() -> Iterator[Any]:
    works: list[IdleWork] = []

    def start(engine: Any) -> IdleWork:
        works.append(IdleWork(engine))
        return works[-1]

    yield start
    for one in works:
        one.stop()


def test_idle_work_is_done_to_its_end_and_gives_way_between(started: Any) -> None:
    engine = IdleEngine(5)
    started(engine)
    soon(lambda: engine.done == engine.waited == 5)


def test_idle_work_waits_while_rounds_are_served(started: Any) -> None:
    engine = IdleEngine(5, used_at=time.monotonic() + 1e6)
    started(engine)
    time.sleep(2 * IDLE_SECONDS)
    assert engine.done == 0
    engine.used_at = 0.0
    soon(lambda: engine.done == 5)


def test_idle_work_waits_while_a_grant_has_the_engine(started: Any) -> None:
    engine = IdleEngine(5)
    with engine.lock:
        started(engine)
        time.sleep(2 * IDLE_SECONDS)
        assert engine.done == 0
    soon(lambda: engine.done == 5)


def test_idle_work_stops_with_its_service(started: Any) -> None:
    engine = IdleEngine(1 << 60)
    work = started(engine)
    soon(lambda: engine.done > 0)
    work.stop()
    done = engine.done
    time.sleep(2 * IDLE_SECONDS)
    assert engine.done == done
