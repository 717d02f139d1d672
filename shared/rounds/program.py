"""The life of a model service, from flags to drain; the draft and verify programs share it."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from outrider.shared.config import flags, telemetry_flags
from outrider.shared.config.schema import Config, ModelConfig, ServeConfig, load
from outrider.shared.core.errors import ConfigError, OutriderError, first_line
from outrider.shared.core.host import cores
from outrider.shared.process import library_env, lifecycle, logs, seeding

if TYPE_CHECKING:
    from outrider.shared.core.types import CostPoint
    from outrider.shared.link.device.handshake import DeviceSide
    from outrider.shared.telemetry.setup import Telemetry

log = logging.getLogger(__name__)

Build = Callable[[ModelConfig, Callable[[str], None]], Any]


def main(
    argv: Sequence[str] | None,
    *,
    section: str,
    service: str,
    make_servicer: Callable[[], Any],
    build: Build,
) -> int:
    """Runs one service until it is told to stop; returns the exit status.

    ``section`` of the configuration, ``service`` as in ``outrider.v1.Draft``; ``build`` loads
    the model and makes the engine, reporting its progress.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m outrider.{service.lower()}_service",
        description=f"Serves the {section} model as outrider.v1.{service}.",
    )
    parser.add_argument("--config", help="TOML file")
    flags.add_section(parser, section)
    telemetry_flags.add(parser, section)
    lifecycle.add_flags(parser)
    args = parser.parse_args(argv)
    reporter = lifecycle.Reporter(args.status_fd)
    try:
        config = load(args.config, flags=flags.settings(args))
    except ConfigError as error:
        reporter.failed(str(error))
        parser.error(str(error))
    return serve(
        config,
        getattr(config, section),
        service=service,
        servicer=make_servicer(),
        build=build,
        reporter=reporter,
        watch_stdin=args.watch_stdin,
    )


def serve(
    config: Config,
    part: Any,
    *,
    service: str,
    servicer: Any,
    build: Build,
    reporter: lifecycle.Reporter,
    watch_stdin: bool = False,
) -> int:
    """Binds, loads, serves, drains. ``part`` is both ``ModelConfig`` and ``ServeConfig``."""
    logs.set_up(config.telemetry.log_level, config.telemetry.log_format)
    stop = lifecycle.Stop()
    if watch_stdin:
        lifecycle.watch_stdin(part.drain_seconds + 5)
    library_env.before_torch(part.threads)
    server = telemetry = None
    serving = False
    try:
        # Imported late so that a wrong flag is told at once, and bound before the model is
        # loaded so that a port in use is.
        from outrider.shared.process.grpc_server import Server
        from outrider.shared.rounds.idle import IdleWork
        from outrider.shared.rounds.servicer import add_to_server

        serve_config: ServeConfig = part
        server = Server(
            serve_config,
            lambda grpc_server: add_to_server(grpc_server, servicer, service),
            [f"outrider.v1.{service}"],
        )
        telemetry = _start_telemetry(config, section_of(service))
        seeding.seed_if_asked(part.process_seed)
        reporter.progress(f"loading {part.path}")
        engine = build(part, reporter.progress)
        servicer.costs = _costs(part, engine, reporter.progress)
        _show(config, telemetry, servicer, engine, service)
        spin = part.link_spin_seconds
        if spin is None:
            spin = spin_seconds(engine.cores, cores())
        servicer.attach(engine, link_spin=spin, device=_device_of(engine))
        idle_work = IdleWork(engine) if engine.works_between else None
        # What is loaded lives as long as the process; the collector need not walk it.
        gc.collect()
        gc.freeze()
        stop.started()
        server.serving()
        serving = True
        log.info("%s serves %s on %s", service, part.path, server.address)
        reporter.ready(str(server.address))
        stop.wait()
        log.info("stopping")
        if idle_work is not None:
            idle_work.stop()
        servicer.drain()
        server.drain(lambda: stop.hurried or servicer.idle())
    except lifecycle.Interrupted:
        if server is not None:
            server.drain(grace=0)
    except Exception as error:
        expected = isinstance(error, OutriderError)
        reason = str(error) if expected else f"{part.path} can't be served: {_kind(error)}"
        # Where nothing was served yet, a traceback is for whoever mends it, on demand.
        log.error("%s", reason, exc_info=serving and not expected)
        log.debug("%s", reason, exc_info=not expected)
        reporter.failed(reason)
        if server is not None:
            server.drain(grace=0)
        return 1
    if telemetry is not None:
        telemetry.shutdown()
    # Everything is released; tearing down the libraries one by one would only take time.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def spin_seconds(busy: int, cores: int) -> float:
    """How long to watch for the other service: a core that sleeps takes longer to wake.

    ``busy``: cores that a forward takes. The other's forward takes about as many, and the
    coordinator one: a thread that watches must have one more, or it holds them up.
    """
    return 0.02 if cores >= busy + 2 else 0.0


def _device_of(engine: Any) -> DeviceSide | None:
    """What there is of device memory."""
    if not engine.info().facts.is_model:
        return None
    # Imported late: torch comes with the model.
    from outrider.shared.link.device.handshake import side_of

    return side_of(engine)


def _costs(
    config: ModelConfig, engine: Any, progress: Callable[[str], None]
) -> Sequence[CostPoint]:
    """What rounds take, where it is wanted and can be found out."""
    if not config.calibrate:
        return ()
    try:
        if not engine.info().facts.is_model:
            from outrider.shared.rounds.calibration import calibrate, plan_for

            return calibrate(engine, plan_for(engine))  # in less time than a file takes
        # Imported late: torch comes with the model.
        from outrider.shared.core.kept import cache_folder
        from outrider.shared.rounds.kept_costs import costs_of

        return costs_of(engine, cache_folder(config.cache_dir), progress)
    except Exception:
        # What rounds take shows while serving, too, only later.
        log.warning("rounds could not be timed", exc_info=True)
        return ()


def _kind(error: Exception) -> str:
    kind, said = type(error).__name__, first_line(error)
    return kind if said == kind else f"{kind}: {said}"


def section_of(service: str) -> str:
    """The section of the configuration for ``outrider.v1.<service>``."""
    return {"Draft": "draft", "Verify": "base"}[service]


def _start_telemetry(config: Config, role: str) -> Telemetry | None:
    """The telemetry that is asked for; the SDK is not even imported where none is."""
    if not config.telemetry.wanted(role):
        return None
    from outrider.shared.telemetry.setup import Telemetry

    return Telemetry(config.telemetry, role)


def _show(
    config: Config, telemetry: Telemetry | None, servicer: Any, engine: Any, service: str
) -> None:
    """Has the rounds seen, and measures the memory's speed for whoever compares with it."""
    if telemetry is not None:
        from outrider.shared.rounds.telemetry import ServiceTelemetry

        servicer.watch(ServiceTelemetry(telemetry, service.lower(), engine.info).round)
    facts = engine.info().facts
    if facts.is_model and (
        config.telemetry.profile or (telemetry is not None and telemetry.metering)
    ):
        from outrider.shared.core.host import read_bandwidth

        servicer.memory_bandwidth = read_bandwidth(facts.device)
