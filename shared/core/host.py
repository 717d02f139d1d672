"""What this host has: cores, and how fast a device reads its memory (what ceilings are made of)."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor


def cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_allowed() -> int:
    """Threads that a program may use: as many as OpenMP is told, else as there are cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(asked) if asked.isdigit() and int(asked) > 0 else cores()


def read_bandwidth(device: str) -> float:
    """Bytes per second, the best of a few passes; 0 where it can't be told.

    ``device`` is "cpu", "cuda:0" or "mps". On CPU a thread on each core sums its part of an array
    larger than most caches, a reading; on CUDA a copy is timed between events, counting both
    its directions. Takes about a tenth of a second and 128 MiB.
    """
    if device == "cpu":
        return _cpu()
    if device.startswith("cuda"):
        return _cuda(device)
    return 0.0


def _cpu(size: int = 128 << 20, passes: int = 6) -> float:
    import numpy as np

    data = np.ones(size // 8, dtype=np.float64)
    parts = np.array_split(data, cores())
    best = float("inf")
    with ThreadPoolExecutor(len(parts)) as threads:
        for _ in range(passes):
            start = time.perf_counter()
            # NumPy lets go of the interpreter while it adds.
            list(threads.map(np.sum, parts))
            best = min(best, time.perf_counter() - start)
    return data.nbytes / best


def _cuda(device: str, size: int = 64 << 20, passes: int = 8) -> float:
    import torch

    try:
        source = torch.empty(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
    except torch.cuda.OutOfMemoryError:
        # The arena has taken what there was; a figure is not worth failing for.
        return 0.0
    best = float("inf")
    for _ in range(passes):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    del source, target
    torch.cuda.empty_cache()
    return 2 * size / best
