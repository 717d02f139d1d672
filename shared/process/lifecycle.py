"""The life of a service process: signals, and the ties to a program that supervises it.

A supervisor holds two pipes to its child. On one the child reports as JSON lines
(``{"event": "progress", "text": …}``, ``{"event": "ready", "address": …}``,
``{"event": "failed", "text": …}``). The other is the child's standard input: nothing is
ever written to it, and when it closes the supervisor is gone, however it died, and the
child stops too. That needs no polling and works on every system.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import threading
from dataclasses import dataclass
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)


class Interrupted(BaseException):
    """A signal asked the process to stop while it was still starting."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that a supervisor passes to its children."""
    parser.add_argument("--status-fd", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--watch-stdin", action="store_true", help=argparse.SUPPRESS)


@dataclass(slots=True)
class Reporter:
    """Tells the supervisor, where there is one, how far this process is."""

    descriptor: int | None = None

    def progress(self, text: str) -> None:
        """One line for a person, such as "loading weights"."""
        log.info("%s", text)
        self._send(event="progress", text=text)

    def ready(self, address: str) -> None:
        """The server at ``address`` serves."""
        self._send(event="ready", address=address)

    def failed(self, text: str) -> None:
        """The process ends for this reason."""
        self._send(event="failed", text=text)

    def _send(self, **event: Any) -> None:
        if self.descriptor is not None:
            # A supervisor that is gone is noticed elsewhere.
            with contextlib.suppress(OSError):
                os.write(self.descriptor, json.dumps(event).encode() + b"\n")


class Stop:
    """What SIGTERM and SIGINT ask for; the second one means at once."""

    def __init__(self) -> None:
        """Takes over both signals; call from the main thread."""
        self.hurried = False
        self._asked = False
        self._raise = True
        # Whichever thread gets a signal writes here. The system may hand it to any, gRPC's among
        # them, and then nothing else wakes the main thread for Python to run the handler there.
        # No event in its place: a handler runs between two steps of the main thread, whatever
        # that holds just then, and would wait for the event's lock and never get it.
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def started(self) -> None:
        """From now on a signal ends ``wait`` instead of raising ``Interrupted``."""
        self._raise = False

    def wait(self) -> None:
        """Until a signal has come."""
        while not self._asked:
            os.read(self._read, 1)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.hurried = self._asked
        self._asked = True
        if self._raise:
            self._raise = False
            raise Interrupted


def watch_stdin(limit_seconds: float) -> None:
    """Stops this process as SIGTERM would when standard input closes.

    A process that has not ended ``limit_seconds`` later ends at once.
    """

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        log.warning("the supervisor is gone; stopping")
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(limit_seconds)
        os._exit(1)

    threading.Thread(target=watch, name="supervisor-watch", daemon=True).start()
