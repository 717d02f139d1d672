"""How many threads run a forward: tried on the machine, since no rule knows it.

More threads read memory faster, up to where it is shared out, and wait for each other at every
step: a model of a few million parameters is slower on sixteen cores than on four. The number
changes no result.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch

from outrider.kernels.cpu.compile import processor
from outrider.shared.model.cpu.kept import found
from outrider.shared.model.cpu.runner import CpuRunner
from outrider.shared.model.runner import Span

ROWS = (1, 4)
"""A step of decoding, and a small verify."""
FLUSH = 32 << 20
"""Bytes that are read before each trial: in a round the other model was here last."""
REPEATS = 5
GAIN = 0.95
"""A larger team must be this much faster, since others use the cores too."""


def best_team(runner: CpuRunner, kept: Path) -> int:
    """The number of threads for ``runner``, of at most ``runner.threads``."""
    if runner.threads == 1:
        return 1
    sizes = [runner.threads]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    circumstances = {
        "processor": processor(),
        "torch": torch.__version__,
        "threads": runner.threads,
        "shape": str(runner.shape),
        "model": runner.sizes,
    }
    return int(found(kept, "team", circumstances, lambda: _try(runner, sizes[::-1])))


def _try(runner: CpuRunner, sizes: list[int]) -> int:
    """The smallest of ``sizes``, which ascend, that no larger one beats by much."""
    extent = runner.arena.admit(max(ROWS))
    other = torch.ones(FLUSH // 4)
    times: dict[int, float] = {}
    try:
        for size in sizes:
            runner.team = size
            took = []
            for turn in range(REPEATS + 1):
                for rows in ROWS:
                    extent.clear()
                    other.sum()
                    begin = time.perf_counter()
                    runner.forward([Span(extent, 0, [0] * rows, rows)])
                    if turn:
                        took.append(time.perf_counter() - begin)
            times[size] = statistics.median(took[:: len(ROWS)]) + statistics.median(took[1::2])
    finally:
        runner.arena.free(extent)
    best = sizes[0]
    for size in sizes[1:]:
        if times[size] < GAIN * times[best]:
            best = size
    return best
