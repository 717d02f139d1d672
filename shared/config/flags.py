"""Command-line flags made from configuration fields: one flag per ``section.key``."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator

from outrider.shared.config.schema import SECRETS, SECTIONS
from outrider.shared.config.setting import Setting, allowed


def add_section(parser: argparse.ArgumentParser, section: str, prefix: str = "") -> None:
    """Adds ``--[prefix-]key`` for every key of ``section``; values stay text until ``load``.

    Secrets have no flag, since command lines are seen by everyone on the host.
    """
    group = parser.add_argument_group(f"[{section}]")
    for spec in dataclasses.fields(SECTIONS[section]):
        if spec.name in SECRETS:
            continue
        name = f"--{prefix}{'-' if prefix else ''}{spec.name.replace('_', '-')}"
        group.add_argument(
            name,
            dest=f"{section}.{spec.name}",
            metavar="VALUE",
            help=f"{spec.metadata['help']} ({allowed(spec)}; default {spec.default})".replace(
                "%", "%%"
            ),
        )


def settings(args: argparse.Namespace) -> Iterator[Setting]:
    """The settings among ``args``: those whose destination is ``section.key``."""
    for dest, value in vars(args).items():
        section, dot, key = dest.partition(".")
        if dot and value is not None:
            source = f"flag --{key.replace('_', '-')}"
            yield Setting(section, key, value, source, text=isinstance(value, str))
