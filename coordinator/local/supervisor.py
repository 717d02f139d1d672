"""``outrider up``: runs all three services and restarts a model service that dies."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from outrider.coordinator.local import children
from outrider.coordinator.local.private_stack import short_folder
from outrider.shared.config.schema import Config, DraftConfig, VerifyConfig
from outrider.shared.process import address

FIRST_BACKOFF, LAST_BACKOFF = 0.5, 30.0
"""Seconds before a part is started again: doubled each time it dies young or is not ready first."""
YOUNG = 30.0
"""Seconds a part that was ready must have lived to start again with the first back-off."""
MOST_STARTS = 3
"""Starts of a part that has never been ready; if all fail, so would the next."""


@dataclass(slots=True)
class SupervisedPart:
    """One supervised service."""

    name: str
    child: children.Child
    started: float
    backoff: float = FIRST_BACKOFF
    starts: int = 1
    served: bool = False
    """Whether it has ever been ready."""
    restart_at: float | None = None


class Supervisor:
    """Keeps all parts of one configuration running until it is told to stop."""

    def __init__(self, config: Config, environment: Mapping[str, str] | None = None) -> None:
        """``config`` with its targets pointing at the services' own addresses.

        ``environment`` is added to that of the services.
        """
        self._config = config
        self._environment = environment
        self._events: queue.SimpleQueue[children.Event] = queue.SimpleQueue()
        self._parts: dict[str, SupervisedPart] = {}
        self._stopping = False
        self._said_ready = False

    def run(self) -> int:
        """Returns the exit status: 0 after a signal, 1 when a part can't be started at all."""
        config = self._config
        names = ["base", *(["draft"] if config.draft.enabled else []), "coordinator"]
        try:
            for name in names:
                self._parts[name] = SupervisedPart(name, self._start(name), time.monotonic())
            while not self._stopping:
                status = self._step()
                if status is not None:
                    return status
            return 0
        finally:
            self._say("up", "stopping")
            longest = max(
                part.drain_seconds for part in (config.base, config.draft, config.coordinator)
            )
            children.stop_in_order([part.child for part in self._parts.values()], longest + 5)
            self._drain_log()

    def stop(self, number: int = 0, frame: FrameType | None = None) -> None:
        """Ends ``run``; a signal handler."""
        self._stopping = True

    def _start(self, name: str) -> children.Child:
        return children.start(name, self._config, self._events, self._environment)

    def _step(self) -> int | None:
        now = time.monotonic()
        for part in self._parts.values():
            if part.restart_at is not None and part.restart_at <= now:
                part.restart_at = None
                part.started = now
                part.child = self._start(part.name)
                self._say("up", f"{part.name} started again, process {part.child.process.pid}")
        try:
            event = self._events.get(timeout=0.2)
        except queue.Empty:
            return None
        part = self._parts[event.child.name]
        if event.kind == "ended" and part.child is event.child and not self._stopping:
            return self._ended(part)
        if event.kind == "line":
            self._say(part.name, event.text)
        elif event.kind == "ready":
            self._say(part.name, f"ready on {event.text}")
            self._announce()
        return None

    def _ended(self, part: SupervisedPart) -> int | None:
        child = part.child
        self._say("up", child.why())
        child.let_go()
        part.served |= child.ready
        # What has served can do so again, once what keeps it from starting has passed: memory that
        # is not free yet, say. Until then the others go on as without it.
        if not part.served and child.failure:
            return 1  # a wrong configuration: it would fail again
        if not part.served and part.starts >= MOST_STARTS:
            self._say("up", f"{part.name} has failed {part.starts} times and was never ready")
            return 1
        part.starts += 1
        age = time.monotonic() - part.started
        settled = child.ready and age > YOUNG  # a start may take as long and fail all the same
        part.backoff = FIRST_BACKOFF if settled else min(2 * part.backoff, LAST_BACKOFF)
        # Jitter keeps parts that die together from coming back together.
        pause = part.backoff * random.uniform(0.5, 1.0)
        part.restart_at = time.monotonic() + pause
        self._say("up", f"{part.name} is started again in {pause:.1f} s")
        return None

    def _announce(self) -> None:
        if not self._said_ready and all(part.child.ready for part in self._parts.values()):
            self._said_ready = True
            target = self._config.coordinator.listen
            self._say(
                "up", f"all services are ready; try: outrider generate --target {target} 'def '"
            )

    def _drain_log(self) -> None:
        while not self._events.empty():
            event = self._events.get()
            if event.kind == "line":
                self._say(event.child.name, event.text)

    def _say(self, name: str, text: str) -> None:
        # Where the log has no reader any more, the services go on.
        with contextlib.suppress(OSError):
            print(f"{name:<11} | {text}", file=sys.stderr, flush=True)


def supervise(config: Config, environment: Mapping[str, str] | None = None) -> int:
    """Runs and supervises all parts of ``config``; returns the exit status.

    ``environment`` is added to that of the services.
    """
    folder = Path(tempfile.mkdtemp(prefix="outrider-", dir=short_folder()))  # mode 0700
    try:
        supervisor = Supervisor(_connected(_private(config, folder)), environment)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, supervisor.stop)
        return supervisor.run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _private(config: Config, folder: Path) -> Config:
    """``config`` with model services that were given no address on sockets in ``folder``.

    Nobody else calls them, and only over sockets can they share memory.
    """
    made = {}
    for name, usual in (("base", VerifyConfig.listen), ("draft", DraftConfig.listen)):
        part = getattr(config, name)
        if part.listen == usual and part.tls_certificate is None:
            part = dataclasses.replace(part, listen=f"unix:{folder}/{name}")
        made[name] = part
    return dataclasses.replace(config, **made)


def _connected(config: Config) -> Config:
    """``config`` with the coordinator's targets set to where the services listen."""
    base, draft = address.parse(config.base.listen), address.parse(config.draft.listen)
    changed: dict[str, Any] = {
        "base_target": str(_reachable(base)),
        "draft_target": str(_reachable(draft)) if config.draft.enabled else None,
        "services_token": config.coordinator.services_token or config.base.token,
    }
    if config.coordinator.tokenizer == "base":
        changed["tokenizer"] = config.base.path
    return dataclasses.replace(
        config, coordinator=dataclasses.replace(config.coordinator, **changed)
    )


def _reachable(where: address.Address) -> address.Address:
    """Where to call a server that listens on every interface."""
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(where.host)
    return dataclasses.replace(where, host=local) if local else where
