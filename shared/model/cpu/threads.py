"""How many threads a forward gains by: tried on the machine, since no rule knows it.

More threads read memory faster, up to where it is shared out, and wait for each other at every
step: a model of a few million parameters is slower on sixteen cores than on four. The number
changes no result. It is where a service begins; ``team`` follows what happens then.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import torch

from outrider.kernels.cpu.compile import processor
from outrider.shared.core.kept import alone, found
from outrider.shared.model.cpu.runner import CpuRunner
from outrider.shared.model.cpu.team import WORTH, sizes_below
from outrider.shared.model.runner import Span

ROWS = (1, 4)
"""A step of decoding, and a small verify."""
FLUSH = 32 << 20
"""Bytes that are read before each trial: in a round the other model was here last."""
REPEATS = 8
GAIN = 0.8
"""A larger team must take less than this much of a smaller one's time."""


def choose_threads(runner: CpuRunner, kept: Path) -> None:
    """Has ``runner`` begin with the best number of threads, at most its ``threads``."""
    if runner.threads == 1:
        return
    sizes = sizes_below(runner.threads)[::-1]
    circumstances = {
        "processor": processor(),
        "torch": torch.__version__,
        "threads": runner.threads,
        "shape": str(runner.shape),
        "model": runner.sizes,
    }

    def find() -> int:
        with alone(kept):
            return smallest_of_the_best({size: _time(runner, size) for size in sizes})

    runner.use(found(kept, "threads", circumstances, find, int))


def smallest_of_the_best(seconds: Mapping[int, float]) -> int:
    """The number of threads that no larger one beats by what it costs; sizes ascend."""
    best, *larger = seconds
    for size in larger:
        if seconds[size] < min(GAIN * seconds[best], seconds[best] - WORTH):
            best = size
    return best


def _time(runner: CpuRunner, team: int) -> float:
    """Seconds of a forward, the mean over ``ROWS`` of the best of some: others may be at work."""
    runner.use(team)
    extent = runner.arena.admit(max(ROWS))
    other = torch.ones(FLUSH // 4)
    best = dict.fromkeys(ROWS, float("inf"))
    try:
        for _ in range(REPEATS):
            for rows in ROWS:
                extent.clear()
                other.sum()
                begin = time.perf_counter()
                runner.forward([Span(extent, 0, [0] * rows, rows)])
                best[rows] = min(best[rows], time.perf_counter() - begin)
    finally:
        runner.arena.free(extent)
    return sum(best.values()) / len(ROWS)
