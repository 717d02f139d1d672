"""How fast a device reads its own memory: what the ceilings are made of."""

from __future__ import annotations

import time


def read_bandwidth(device: str) -> float:
    """Bytes per second, the best of a few passes; 0 where it can't be told.

    ``device`` is "cpu", "cuda:0" or "mps". On CPU one thread sums an array larger than most
    caches, a reading; on CUDA a copy is timed between events, counting both its directions.
    Takes about a tenth of a second and 128 MiB.
    """
    if device == "cpu":
        return _cpu()
    if device.startswith("cuda"):
        return _cuda(device)
    return 0.0


def _cpu(size: int = 128 << 20, passes: int = 4) -> float:
    import numpy as np

    data = np.ones(size // 8, dtype=np.float64)
    best = float("inf")
    for _ in range(passes):
        start = time.perf_counter()
        data.sum()
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
