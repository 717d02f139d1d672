"""What an engine does while nobody asks it for a round: captures the launches of sizes that came
before, say, so that whoever asks for them next does not wait for that."""

from __future__ import annotations

import threading
import time
from typing import Any

from outrider.shared.rounds.session import Engine

IDLE_SECONDS = 0.3
"""Without a round for so long, nobody is likely to ask for one within the next hundredth of a
second. Between the rounds of a stream it is a few milliseconds, or some ten where the other model
takes in prompts."""


class IdleWork:
    """Does it, on a thread, until ``stop``."""

    def __init__(self, engine: Engine[Any, Any]) -> None:
        self._engine = engine
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="idle work", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Returns once nothing is under way."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(IDLE_SECONDS):
            while not self._stopped.is_set() and self._piece():
                self._engine.give_way()

    def _piece(self) -> bool:
        """Does a piece where the engine is idle; whether there may be more."""
        engine = self._engine
        if time.monotonic() - engine.used_at < IDLE_SECONDS:
            return False
        if not engine.lock.acquire(blocking=False):
            return False  # a grant has it
        try:
            return engine.runner.between()
        finally:
            engine.lock.release()
