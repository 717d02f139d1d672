"""The flags of logs, traces and metrics; every one of them is a key of ``[telemetry]``."""

from __future__ import annotations

import argparse
import dataclasses

from outrider.shared.config.setting import allowed
from outrider.shared.config.telemetry import TelemetryConfig

_FLAGS = {
    "--log-level": "log_level",
    "--log-format": "log_format",
    "--traces": "traces",
    "--metrics": "metrics",
    "--otlp-endpoint": "endpoint",
    "--telemetry-file": "file",
    "--sample-ratio": "sample_ratio",
}


def add(parser: argparse.ArgumentParser, *roles: str, log_level: bool = True) -> None:
    """Adds the flags; for one role ``--prometheus-port``, for several one port flag each.

    ``log_level``: False where the parser has that flag already.
    """
    group = parser.add_argument_group("[telemetry]")
    specs = {spec.name: spec for spec in dataclasses.fields(TelemetryConfig)}
    flags = {flag: key for flag, key in _FLAGS.items() if log_level or key != "log_level"}
    for role in roles:
        flag = "--prometheus-port" if len(roles) == 1 else f"--prometheus-{role}"
        flags[flag] = f"prometheus_{role}"
    for flag, key in flags.items():
        spec = specs[key]
        group.add_argument(
            flag,
            dest=f"telemetry.{key}",
            metavar="VALUE",
            help=f"{spec.metadata['help']} ({allowed(spec)}; default {spec.default})",
        )
