"""The three processes for one command: private, over unix sockets, and gone afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from outrider.coordinator.local import children
from outrider.shared.config.schema import Config
from outrider.shared.core.errors import ServiceUnavailable

START_SECONDS = 600.0
"""A large model may take minutes to load; one that takes longer is given up."""
STOP_SECONDS = 15.0
"""The driver takes seconds to give back a large GPU arena."""


@dataclass(frozen=True, slots=True)
class Deployed:
    """The targets of what runs."""

    coordinators: Mapping[str, str]
    """By name."""
    base: str
    draft: str | None
    config: Config
    """With the addresses of the services."""
    environment: Mapping[str, str]
    """What is added to that of the processes."""


@contextmanager
def deployment(
    config: Config,
    progress: Callable[[str, str], None] = lambda name, text: None,
    log: TextIO | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Starts all parts of ``config`` over sockets in a fresh folder; yields the target.

    ``progress`` is told the part's name and what it does; log lines go to ``log``;
    ``environment`` is added to that of the processes. Raises
    ``ServiceUnavailable`` with the reason when a part fails to start. Leaves no process,
    socket or file behind.
    """
    with deployments(config, {"coordinator": {}}, progress, log, environment) as deployed:
        yield deployed.coordinators["coordinator"]


@contextmanager
def deployments(
    config: Config,
    coordinators: Mapping[str, Mapping[str, Any]],
    progress: Callable[[str, str], None] = lambda name, text: None,
    log: TextIO | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Deployed]:
    """``deployment`` with several coordinators over one pair of services.

    ``coordinators``: by name, what of the configuration each has of its own.
    """
    folder = Path(tempfile.mkdtemp(prefix="outrider-", dir=short_folder()))  # mode 0700
    try:
        private = over_sockets(config, folder)
        # What the children's libraries write to temporary folders goes with this one.
        own = {**(environment or {}), "TMPDIR": str(folder)}
        # The slowest to load first.
        parts = [("base", private)]
        if private.draft.enabled:
            parts.append(("draft", private))
        targets = {}
        for name, changes in coordinators.items():
            targets[name] = f"unix:{folder}/{name}"
            parts.append(("coordinator", _listening(private, targets[name], **changes)))
        with _running(parts, own, progress, log):
            target = private.coordinator
            yield Deployed(targets, target.base_target, target.draft_target, private, own)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def fresh_coordinator(deployed: Deployed, log: TextIO | None = None) -> Iterator[str]:
    """One more coordinator over the services that run, for as long as the block; its target.

    It has learnt nothing yet. Raises ``ServiceUnavailable`` where it does not start.
    """
    listen = f"{deployed.config.coordinator.listen}-{secrets.token_hex(4)}"
    parts = [("coordinator", _listening(deployed.config, listen))]
    with _running(parts, deployed.environment, lambda name, text: None, log):
        yield listen


@contextmanager
def _running(
    parts: Sequence[tuple[str, Config]],
    environment: Mapping[str, str],
    progress: Callable[[str, str], None],
    log: TextIO | None,
) -> Iterator[None]:
    """Runs a process for each (section, configuration) as long as the block, all of them ready.

    Raises ``ServiceUnavailable`` where one does not start.
    """
    running: list[children.Child] = []
    events: queue.SimpleQueue[children.Event] = queue.SimpleQueue()
    try:
        for name, config in parts:
            running.append(children.start(name, config, events, environment))
        _wait(running, events, progress, log)
        threading.Thread(target=_watch, args=(running, events, log), daemon=True).start()
        yield
    finally:
        # Nobody is served any more, so they need not stop in order.
        children.stop(running, STOP_SECONDS)
        for child in running:
            child.let_go()


def _listening(config: Config, target: str, **changes: Any) -> Config:
    """``config`` with a coordinator that listens on ``target``."""
    part = dataclasses.replace(config.coordinator, listen=target, **changes)
    return dataclasses.replace(config, coordinator=part)


def over_sockets(config: Config, folder: Path) -> Config:
    """``config`` with every part listening on a socket in ``folder``, and without tokens."""
    secured = ("tls_certificate", "tls_key", "tls_client_ca", "token")
    plain: dict[str, Any] = dict.fromkeys(secured)
    return dataclasses.replace(
        config,
        base=dataclasses.replace(config.base, listen=f"unix:{folder}/base", **plain),
        draft=dataclasses.replace(config.draft, listen=f"unix:{folder}/draft", **plain),
        coordinator=dataclasses.replace(
            config.coordinator,
            listen=f"unix:{folder}/coordinator",
            base_target=f"unix:{folder}/base",
            draft_target=f"unix:{folder}/draft" if config.draft.enabled else None,
            # Whoever waits here watches the processes, and knows better when to give up.
            start_timeout_seconds=START_SECONDS,
            draft_start_seconds=START_SECONDS,
            services_token=None,
            services_ca=None,
            services_certificate=None,
            services_key=None,
            **plain,
        ),
    )


def _wait(
    running: list[children.Child],
    events: queue.SimpleQueue[children.Event],
    progress: Callable[[str, str], None],
    log: TextIO | None,
) -> None:
    """Until every part is ready."""
    until = time.monotonic() + START_SECONDS
    ready: set[children.Child] = set()  # by the events, so that none is left untold
    while len(ready) < len(running):
        try:
            event = events.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            late = ", ".join(child.name for child in running if child not in ready)
            raise ServiceUnavailable(f"not ready after {START_SECONDS:g} s: {late}") from None
        if event.kind == "ended":
            raise ServiceUnavailable(event.text)
        if event.kind == "failed":
            raise ServiceUnavailable(f"{event.child.name}: {event.text}")
        if event.kind == "ready":
            ready.add(event.child)
        if event.kind in ("progress", "ready"):
            progress(event.child.name, event.text if event.kind == "progress" else "ready")
        elif log is not None:
            print(f"{event.child.name} | {event.text}", file=log, flush=True)


def _watch(
    running: list[children.Child], events: queue.SimpleQueue[children.Event], log: TextIO | None
) -> None:
    """Copies logs; without the base nothing goes on, so its death ends the coordinator too."""
    with contextlib.suppress(OSError, ValueError):
        while True:
            event = events.get()
            if event.kind == "ended" and event.child.name == "base":
                children.stop([child for child in running if child.name == "coordinator"], 0.0)
            if log is not None:
                print(f"{event.child.name} | {event.text}", file=log, flush=True)


def short_folder() -> str | None:
    """Where to make the private folder: the usual place unless its path is too long for sockets."""
    return None if len(tempfile.gettempdir()) < 60 else "/tmp"
