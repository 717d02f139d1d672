"""Child processes: started, listened to, and certain to end.

A child gets a pipe to report on and another that closes when this process is gone (see
``shared/process/lifecycle.py``), so a killed supervisor leaves no orphans. It runs in a session of
its own: a Ctrl-C on the terminal reaches the supervisor alone, which then stops its children in
order.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from outrider.shared.config.schema import Config, environment_of

PROGRAMS: Mapping[str, tuple[str, ...]] = {
    "draft": ("outrider.draft_service",),
    "base": ("outrider.verify_service",),
    "coordinator": ("outrider.coordinator.cli.main", "serve", "coordinator"),
}
"""By section of the configuration: module and arguments."""


@dataclass(frozen=True, slots=True)
class Event:
    """What a child did: ``progress``, ``ready``, ``failed``, ``line`` (of its log), ``ended``."""

    child: Child
    kind: str
    text: str


@dataclass(eq=False, slots=True)
class Child:
    """One running child; events go to ``events``, the last one being ``ended``."""

    name: str
    process: subprocess.Popen[bytes]
    events: queue.SimpleQueue[Event]
    ready: bool = False
    tail: list[str] = field(default_factory=list)
    """The last lines of its log."""
    failure: str = ""

    def terminate(self) -> None:
        """Asks it to stop."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)

    def let_go(self) -> None:
        """Closes the pipe that ends it with us; it has ended, or nobody is to wait for it."""
        if self.process.stdin is not None:
            self.process.stdin.close()

    def why(self) -> str:
        """Why it ended, for a person."""
        if self.failure:
            return self.failure
        code = self.process.poll()
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        else:
            how = f"ended with status {code}"
        if code == 0:
            return f"the {self.name} process ended"
        last = "".join(f"\n  {line}" for line in self.tail[-8:])
        return f"the {self.name} process {how}{last}"


def start(
    name: str,
    config: Config,
    events: queue.SimpleQueue[Event],
    environment: Mapping[str, str] | None = None,
) -> Child:
    """Starts the part ``name`` ("base", "draft" or "coordinator") of ``config``.

    ``environment`` is added to this process's own.
    """
    status_read, status_write = os.pipe()
    try:
        process = subprocess.Popen(
            [
                # Safe path: the folder we stand in may hold anything, modules' names included.
                *(sys.executable, "-P", "-m", *PROGRAMS[name]),
                *("--status-fd", str(status_write), "--watch-stdin"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(status_write,),
            env=_environment(config) | dict(environment or {}),
            start_new_session=True,
        )
    except BaseException:
        os.close(status_read)
        raise
    finally:
        os.close(status_write)
    child = Child(name, process, events)
    threading.Thread(target=_listen, args=(child, status_read), daemon=True).start()
    return child


def stop(children: Iterable[Child], grace: float) -> None:
    """Stops all of them at once; those that take longer than ``grace`` seconds are killed."""
    running = [child for child in children if child.process.poll() is None]
    for child in running:
        child.terminate()
    until = time.monotonic() + grace
    for child in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(max(0.0, until - time.monotonic()))
    for child in running:
        if child.process.poll() is None:
            child.process.kill()
            child.process.wait()


def stop_in_order(children: Sequence[Child], grace: float) -> None:
    """Stops the coordinator first, so that it takes leave of the services, then those."""
    stop([child for child in children if child.name == "coordinator"], grace)
    stop(children, grace)
    for child in children:
        child.let_go()


def _environment(config: Config) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("OUTRIDER_")}
    return kept | environment_of(config)


def _listen(child: Child, status: int) -> None:
    """Turns what the child reports and logs into events until it has ended."""
    reports = threading.Thread(target=_reports, args=(child, status), daemon=True)
    reports.start()
    stream = child.process.stderr
    assert stream is not None
    for raw in stream:
        line = raw.decode(errors="replace").rstrip("\n")
        child.tail = [*child.tail[-19:], line]
        child.events.put(Event(child, "line", line))
    stream.close()
    child.process.wait()
    reports.join()
    child.events.put(Event(child, "ended", child.why()))


def _reports(child: Child, status: int) -> None:
    with open(status, "rb") as stream:  # a descriptor, not a path
        for raw in stream:
            try:
                event = json.loads(raw)
                kind = str(event["event"])
                text = str(event.get("text") or event.get("address") or "")
            except (ValueError, KeyError, TypeError):
                continue
            if kind == "ready":
                child.ready = True
            elif kind == "failed":
                child.failure = text
            child.events.put(Event(child, kind, text))
