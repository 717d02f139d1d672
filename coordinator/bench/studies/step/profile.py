"""Where the time of a step goes: each operation of ``CudaRunner`` by itself, against its bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from outrider.shared.model.cuda.forward import Batch, Forward


@dataclass(frozen=True, slots=True)
class StepPart:
    """One operation of a step, all layers: launches, weight bytes read, seconds."""

    name: str
    launches: int
    weight_bytes: int
    seconds: float


def graph_seconds(run: Callable[[], None], repeats: int = 20) -> float:
    """Seconds of one replay of ``run`` as a CUDA graph: the median of three means."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    for _ in range(3):
        graph.replay()
    means: list[float] = []
    for _ in range(3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        end.synchronize()
        means.append(begin.elapsed_time(end) / repeats / 1e3)
    return sorted(means)[1]


def copy_bandwidth(device: torch.device, size: int = 1 << 30) -> float:
    """Bytes per second of a device-to-device copy far larger than the cache, read plus written."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        target.copy_(source)
    begin.record()
    for _ in range(10):
        target.copy_(source)
    end.record()
    end.synchronize()
    return 10 * 2 * size / (float(begin.elapsed_time(end)) / 1e3)


def parts(step: Forward, batch: Batch, rows: int, sequences: int, queries: int) -> list[StepPart]:
    """Every operation alone over all layers, then what the step takes with the operations
    together; the sum of the parts against the whole shows what overlapping saves."""
    layers = range(len(step.weights.layers))
    weights = step.weights.layers

    def each(call: Callable[[int], None]) -> Callable[[], None]:
        def run() -> None:
            for layer in layers:
                call(layer)

        return run

    def size(name: str) -> int:
        return sum(getattr(layer, name).nbytes for layer in weights)

    count = len(weights)
    named: list[tuple[str, int, int, Callable[[], None]]] = [
        ("embed", 1, 0, lambda: step.embed(batch.tokens, rows)),
        ("norm + q, k, v", count, size("qkv"), each(lambda i: step.qkv(i, rows))),
        (
            "rotary + append + attention",
            count,
            0,
            each(lambda i: step.attention(i, batch, sequences, queries)),
        ),
        ("output + residual", count, size("output"), each(lambda i: step.output(i, rows))),
        ("norm + gate, up + silu", count, size("gate_up"), each(lambda i: step.gate_up(i, rows))),
        ("down + residual", count, size("down"), each(lambda i: step.down(i, rows))),
        ("norm + head", 1, step.weights.head.nbytes, lambda: step.head(rows)),
    ]
    found = [StepPart(name, n, nbytes, graph_seconds(run)) for name, n, nbytes, run in named]
    whole = graph_seconds(lambda: step.run(batch, rows, sequences, queries))
    total = sum(part.weight_bytes for part in found)
    return [*found, StepPart("whole step", sum(p.launches for p in found), total, whole)]
