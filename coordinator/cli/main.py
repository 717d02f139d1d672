"""The ``outrider`` command.

Exit status: 0 done, 1 it failed, 2 it was asked for wrongly, 130 interrupted.
Every command imports what it needs when it runs, so that help and errors come at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from outrider.coordinator.cli import generate_flags, plan, profile, report
from outrider.shared.config import flags, telemetry_flags
from outrider.shared.config.argument_types import whole
from outrider.shared.config.schema import Config, load
from outrider.shared.core.errors import ConfigError, InvalidRequest, OutriderError
from outrider.shared.core.links import AUTO, LINKS
from outrider.shared.process import library_env, lifecycle

SERVICES = {"draft": "draft", "verify": "base"}
"""Services that are programs of their own, with their section of the configuration."""


class CommandInterrupted(BaseException):
    """A signal asked the command to stop; ``status`` is the exit status it asks for."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["serve"] and words[1:2] and words[1] in SERVICES:
        _become_service(words[1], words[2:])
    parser = make_parser(words)
    args = parser.parse_args(words)
    try:
        return int(args.run(args))
    except CommandInterrupted as stop:
        return stop.status
    except BrokenPipeError:
        # Whoever read our output has gone; the interpreter must not complain at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (InvalidRequest, ConfigError) as error:
        print(f"outrider: error: {error}", file=sys.stderr)
        return 2
    except (OutriderError, ConnectionError) as error:
        print(f"outrider: error: {error}", file=sys.stderr)
        return 1


def make_parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The whole command line; ``words`` are looked at to leave out what they do not need."""
    parser = argparse.ArgumentParser(
        prog="outrider", description="Speculative decoding as separate services."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_serve(commands)
    _add_up(commands)
    _add_info(commands)
    doctor = commands.add_parser("doctor", help="show versions, devices and what is missing")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(run=_doctor)
    _add_bench(commands, words)
    profile.add_parser(commands)
    report.add_parser(commands)
    plan.add_parser(commands)
    return parser


# --- generate ----------------------------------------------------------------------------------


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser("generate", help="continue a prompt")
    _add_models(parser)
    _add_target(parser)
    generate_flags.add_arguments(parser)
    parser.add_argument(
        "--logprobs", type=whole(0), metavar="COUNT", help="of each token and the likeliest ones"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--stats", action="store_true", help="show figures afterwards")
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="write where the time went, as JSON"
    )
    parser.set_defaults(run=_generate)


def _generate(args: argparse.Namespace) -> int:
    if args.profile is not None:
        vars(args)["telemetry.profile"] = True
    config = _load(args)
    _interruptible()
    from outrider.coordinator.cli import generate

    return generate.run(args, config)


# --- serve and up ------------------------------------------------------------------------------


def _become_service(name: str, words: Sequence[str]) -> None:
    """Replaces this process by the service: its module is never imported here."""
    module = f"outrider.{name}_service"
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, *words])


def _add_serve(commands: Any) -> None:
    parser = commands.add_parser("serve", help="run one service: draft, verify or coordinator")
    services = parser.add_subparsers(metavar="SERVICE", required=True)
    for name in SERVICES:
        # For the help text; main has handed these over before they are parsed.
        services.add_parser(name, help=f"the {name} service", add_help=False)
    coordinator = services.add_parser("coordinator", help="the coordinator, which clients call")
    coordinator.add_argument("--config", help="TOML file")
    flags.add_section(coordinator, "coordinator")
    telemetry_flags.add(coordinator, "coordinator")
    lifecycle.add_flags(coordinator)
    coordinator.set_defaults(run=_serve_coordinator)


def _serve_coordinator(args: argparse.Namespace) -> int:
    reporter = lifecycle.Reporter(args.status_fd)
    library_env.before_grpc()
    try:
        config = _load(args)
        from outrider.coordinator.server.program import run_coordinator

        return run_coordinator(config, reporter, watch_stdin=args.watch_stdin)
    except OutriderError as error:
        reporter.failed(str(error))
        raise


def _add_up(commands: Any) -> None:
    parser = commands.add_parser(
        "up", help="run and supervise all three services from one file, or the defaults"
    )
    _add_models(parser)
    parser.add_argument("--listen", dest="coordinator.listen", help="where clients call")
    parser.add_argument("--no-draft", action="store_true", help="the base alone")
    telemetry_flags.add(parser, "coordinator", "base", "draft", log_level=False)
    parser.set_defaults(run=_up)


def _up(args: argparse.Namespace) -> int:
    config = _load(args)
    from outrider.coordinator.local.cuda_mps import daemon
    from outrider.coordinator.local.supervisor import supervise

    with daemon(args.cuda_mps) as environment:
        return supervise(config, environment)


# --- info, doctor, bench -----------------------------------------------------------------------


def _add_info(commands: Any) -> None:
    parser = commands.add_parser("info", help="describe a running coordinator")
    _add_target(parser)
    parser.add_argument("--config", help="TOML file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_info)


def _info(args: argparse.Namespace) -> int:
    from outrider.coordinator.cli import info

    return info.run(args, _load(args))


def _doctor(args: argparse.Namespace) -> int:
    from outrider.coordinator.cli import doctor

    return doctor.run(args)


def _add_bench(commands: Any, words: Sequence[str]) -> None:
    parser = commands.add_parser("bench", help="measure speculation against the base alone")
    _add_models(parser)
    _add_target(parser)
    if "bench" in words:
        from outrider.coordinator.bench import command, registry

        command.add_arguments(parser)
        registry.add_parsers(parser, words, _add_models)
    parser.set_defaults(run=_bench, study=None)


def _bench(args: argparse.Namespace) -> int:
    config = _load(args)
    _interruptible()
    from outrider.coordinator.bench import command, registry
    from outrider.coordinator.cli import display
    from outrider.coordinator.local.cuda_mps import daemon
    from outrider.coordinator.local.private_stack import deployment

    if args.study is not None:
        return registry.run_study(args, config)
    command.check(args)
    if args.in_process:
        return command.measure_in_process(args, config)
    if args.target is not None:
        return command.measure_target(args, args.target, config)
    progress = display.Progress(sys.stderr)
    log = sys.stderr if args.verbose else None
    with daemon(args.cuda_mps) as own, deployment(config, progress, log, own) as target:
        progress.clear()
        return command.measure_target(args, target, config)


# --- parts -------------------------------------------------------------------------------------


class _Version(argparse.Action):
    """argparse's own wants the text before anybody has asked for it; reading it is not free."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib import metadata

        parser.exit(message=f"outrider {metadata.version('outrider')}\n")


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", help="TOML file")
    parser.add_argument("--base", dest="base.path", help="folder or hub id of the base model")
    parser.add_argument("--draft", dest="draft.path", help="folder or hub id of the draft model")
    parser.add_argument("--device", help="of both models: auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--base-device", dest="base.device", help="of the base model")
    parser.add_argument("--draft-device", dest="draft.device", help="of the draft model")
    parser.add_argument("--dtype", help="of both models: auto, float32, float16 or bfloat16")
    parser.add_argument(
        "--link",
        dest="coordinator.link",
        help=f"between draft and base: {', '.join((AUTO, *LINKS))}",
    )
    parser.add_argument(
        "--cuda-mps", action="store_true", help="run NVIDIA's MPS daemon for these processes"
    )
    parser.add_argument("--log-level", dest="telemetry.log_level", help="show the services' logs")


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", help="address of a running coordinator: host:port, unix:/path")
    parser.add_argument("--ca", help="PEM file of the coordinator's CA; turns TLS on")


def _load(args: argparse.Namespace) -> Config:
    """The configuration, with flags that stand for several settings taken apart."""
    values = vars(args)
    for name in ("device", "dtype"):
        if values.get(name) is not None:
            for section in ("base", "draft"):
                if values.get(f"{section}.{name}") is None:
                    values[f"{section}.{name}"] = values[name]
    if values.get("no_draft"):
        values["draft.enabled"] = False
    if values.get("base.path") is not None and "coordinator.tokenizer" not in values:
        values["coordinator.tokenizer"] = values["base.path"]
    values["verbose"] = values.get("telemetry.log_level") is not None
    return load(values.get("config"), flags=flags.settings(args))


def _interruptible() -> None:
    """The first SIGINT, SIGTERM or SIGHUP raises ``CommandInterrupted``; clean-up has peace."""

    def handle(number: int, frame: FrameType | None) -> None:
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(one, signal.SIG_IGN)
        raise CommandInterrupted(number)

    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, handle)


if __name__ == "__main__":
    sys.exit(main())
