"""The studies of ``outrider bench STUDY``. Only the one that is asked for is imported."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from outrider.shared.config.schema import Config

STUDIES = {
    "serve": ("serve.command", "requests at a rate or a concurrency, ours or any OpenAI server's"),
    "plant": ("models.plant", "make a checkpoint of any true size with known acceptance"),
    "step": (
        "studies.step.study",
        "step times of one model process, with the share of the ceiling",
    ),
    "adaptive": ("studies.adaptive", "the choice of K against every fixed K, at any load"),
    "links": ("studies.links", "rounds over grpc and shared memory, against one process"),
    "timeline": ("studies.timeline", "who works when, draft and base, over each link"),
    "arena": ("studies.arena", "rollback, admission and append against transformers' caches"),
    "prefixes": ("prefixes", "the first token of a chat's second turn"),
    "plot": ("plots.command", "SVG plots of the figures that were written with --json"),
    "tracing": ("studies.telemetry_cost", "what it costs to trace every round"),
}


def add_parsers(
    parser: argparse.ArgumentParser,
    words: Sequence[str],
    add_models: Callable[[argparse.ArgumentParser], None],
) -> None:
    """Adds one sub-command a study; the flags of those not among ``words`` are left out.

    ``add_models`` adds the flags that choose models, for studies that set ``NEEDS_MODELS``.
    """
    commands = parser.add_subparsers(metavar="STUDY", dest="study")
    for name, (_, summary) in STUDIES.items():
        study = commands.add_parser(name, help=summary)
        if name in words:
            module = _module(name)
            if getattr(module, "NEEDS_MODELS", False):
                add_models(study)
            module.add_arguments(study)


def run_study(args: argparse.Namespace, config: Config) -> int:
    """Runs the study that was asked for; returns the exit status."""
    return int(_module(args.study).run(args, config))


def _module(name: str) -> Any:
    return importlib.import_module(f"outrider.coordinator.bench.{STUDIES[name][0]}")
