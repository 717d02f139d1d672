"""``outrider bench plot``: SVG plots of the figures that the studies wrote with ``--json``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from outrider.coordinator.bench.plots import (
    adaptive,
    arena,
    drawing,
    links,
    serve,
    speed,
    timeline,
)
from outrider.shared.config.schema import Config
from outrider.shared.core.errors import ConfigError

# What only the figures of this kind have -> what draws them.
_KINDS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "rollback": arena.draw,
    "copy_bandwidth": speed.draw_step,
    "bare": links.draw,
    "timelines": timeline.draw,
    "points": adaptive.draw,
    "levels": serve.draw,
    "variants": speed.draw_bench,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="JSON of a study, or a folder of them"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("plots"), help="folder to write (default: plots)"
    )


def run(args: argparse.Namespace, config: Config | None = None) -> int:
    """Writes the plots and prints their names; returns the exit status."""
    plots: dict[str, str] = {}
    for file in _files(args.files):
        plots |= render(file)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, text in plots.items():
        (args.out / name).write_text(text, encoding="utf-8")
        print(args.out / name)
    return 0


def render(file: Path) -> dict[str, str]:
    """File name -> SVG, for one file of figures. Raises ``ConfigError`` for any other file."""
    try:
        figures = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} can't be read: {error}") from error
    for field, draw in _KINDS.items():
        if isinstance(figures, dict) and field in figures:
            with drawing.styled():
                return {
                    f"{file.stem}-{part}".removesuffix("-") + ".svg": drawing.svg(figure)
                    for part, figure in draw(figures).items()
                }
    raise ConfigError(
        f"{file} holds no figures of `outrider bench` or of its studies adaptive, arena, step, "
        "links, timeline and serve"
    )


def _files(paths: Sequence[Path]) -> list[Path]:
    return [
        file
        for path in paths
        for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])
    ]
