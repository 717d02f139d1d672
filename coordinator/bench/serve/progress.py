"""One changing line on a terminal while a level is measured."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from outrider.coordinator.bench.serve.answer import Answer

INTERVAL = 0.2
"""Seconds between two lines at least: writing them is the client's work, too."""


def watcher(name: str, total: int, stream: TextIO) -> Callable[[Sequence[Answer]], None]:
    """Shows on ``stream`` how far the level ``name`` of ``total`` requests is; nothing where that
    is no terminal."""
    if not stream.isatty():
        return lambda answers: None
    shown = 0.0

    def show(answers: Sequence[Answer]) -> None:
        nonlocal shown
        if time.monotonic() < shown + INTERVAL:
            return
        shown = time.monotonic()
        failed = sum(one.failure is not None for one in answers)
        ended = sum(one.ended is not None for one in answers)
        line = f"{name}: {ended} of {total} done, {len(answers) - ended} in flight"
        line += f", {failed} failed" if failed else ""
        stream.write("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1])
        stream.flush()

    return show


def clear(stream: TextIO) -> None:
    """Takes the line away."""
    if stream.isatty():
        stream.write("\r\x1b[K")
        stream.flush()
