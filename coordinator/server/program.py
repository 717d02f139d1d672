"""The coordinator as a process: signals, supervisor, exit."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable

from outrider.coordinator.server import service
from outrider.coordinator.telemetry.observer import TelemetryObserver
from outrider.shared.config.schema import Config
from outrider.shared.core.errors import OutriderError
from outrider.shared.process import lifecycle, logs
from outrider.shared.telemetry.setup import Telemetry

log = logging.getLogger(__name__)


def run_coordinator(config: Config, reporter: lifecycle.Reporter, *, watch_stdin: bool) -> int:
    """Serves until SIGTERM or SIGINT, then drains; the second signal cuts that short.

    Raises ``OutriderError`` when it can't start.
    """
    logs.set_up(config.telemetry.log_level, config.telemetry.log_format)
    telemetry = Telemetry(config.telemetry, "coordinator")
    if watch_stdin:
        lifecycle.watch_stdin(config.coordinator.drain_seconds + 5)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_serve(config, reporter, telemetry))
    except BaseExceptionGroup as group:
        raise _first(group) from None
    finally:
        telemetry.shutdown()
    logging.shutdown()
    sys.stderr.flush()
    # Everything is closed; the rest of the interpreter's farewell only takes time.
    os._exit(0)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed: gRPC wakes the loop through a socket for every message, and
    it takes some 30 µs less for that."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


async def _serve(config: Config, reporter: lifecycle.Reporter, telemetry: Telemetry) -> None:
    stop, hurry = asyncio.Event(), asyncio.Event()

    def asked() -> None:
        (hurry if stop.is_set() else stop).set()
        if not started:
            main.cancel()

    started = False

    def ready(address: str) -> None:
        nonlocal started
        started = True
        log.info("the coordinator listens on %s", address)
        reporter.ready(address)

    loop = asyncio.get_running_loop()
    main = asyncio.ensure_future(
        service.serve(
            config.coordinator,
            stop=stop,
            hurry=hurry,
            observer=TelemetryObserver(telemetry, profile=config.telemetry.profile),
            progress=reporter.progress,
            ready=ready,
        )
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked)
    try:
        await main
    except asyncio.CancelledError:
        if not stop.is_set():
            raise


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What went wrong, out of what the tasks of a group raised together."""
    found = group.subgroup(OutriderError) or group
    error: BaseException = found
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
