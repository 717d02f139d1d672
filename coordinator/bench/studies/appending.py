"""Appending one token to a long context: the arena against transformers' own caches.

The same model and the same step for each: one new token a sequence after ``length`` cached ones.
*append* is the caches' own part, all layers: writing the new keys and values, and handing out
what attention reads. *step* is the whole forward. *memory* is what a step needs beyond the
weights and the KV held: on CUDA the allocator's peak, on Linux the peak of resident memory.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from outrider.coordinator.bench import tables
from outrider.shared.config.schema import ModelConfig
from outrider.shared.model.loading import make_runner
from outrider.shared.model.runner import Runner, Span

CACHES = ("arena, llama path", "arena, generic path", "DynamicCache", "StaticCache")
_WARM = 3


def measure(
    *,
    device: torch.device,
    lengths: Sequence[int],
    batches: Sequence[int],
    steps: int,
    layers: int,
    hidden: int,
) -> dict[str, Any]:
    """Times in seconds (medians) and bytes, for every cache, length and batch."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    found = []
    with torch.inference_mode():
        for batch in batches:
            for length in lengths:
                for cache in CACHES:
                    model = _model(layers, hidden, max(lengths) + 64, dtype, device)
                    subject = _subject(cache, model, batch, length, steps)
                    found.append(
                        {"cache": cache, "batch": batch, "length": length}
                        | _take(subject, device, steps)
                    )
                    del subject, model
                    gc.collect()
    return {
        "appending": found,
        "model": {"layers": layers, "hidden": hidden, "dtype": str(dtype), "device": str(device)},
    }


def table(figures: dict[str, Any]) -> str:
    """The figures of ``measure`` as Markdown, with times over those of the arena's own path."""
    model = figures["model"]
    rows = [
        [
            r["cache"],
            str(r["batch"]),
            f"{r['length']:,}",
            f"{r['append'] * 1e6:,.0f}",
            f"{r['step'] * 1e3:.2f}",
            tables.number(None if r["memory"] is None else r["memory"] / 2**20, 1, "-"),
            f"{r['kv'] / 2**20:,.0f}",
        ]
        for r in figures["appending"]
    ]
    title = (
        f"Llama of {model['layers']} layers, hidden {model['hidden']}, {model['dtype']} on "
        f"{model['device']}; one new token a sequence:\n\n"
    )
    header = ["cache", "batch", "cached", "append, µs", "step, ms", "memory, MiB", "KV held, MiB"]
    return title + tables.markdown(header, rows)


class _Subject:
    """One cache, filled; ``append`` and ``step`` add one token a sequence."""

    kv = 0

    def append(self) -> None:
        """Writes one token's random keys and values in every layer."""
        raise NotImplementedError

    def step(self) -> None:
        """Forwards one token of every sequence."""
        raise NotImplementedError


class _InArena(_Subject):
    def __init__(self, runner: Runner, batch: int, length: int, room: int) -> None:
        self.runner = runner
        for tensor in runner.storage.tensors:
            tensor.normal_()
        self.extents = [runner.arena.admit(length + room) for _ in range(batch)]
        for extent in self.extents:
            extent.advance(length)
        storage = runner.storage
        self.kv = sum(t.nbytes for t in storage.tensors) * (length + room) * batch
        self.kv //= runner.arena.tokens
        kind = storage.kinds[0]
        self.fresh = torch.randn(
            1, kind.kv_heads, kind.key_dim, dtype=storage.dtype, device=storage.device
        )

    def append(self) -> None:
        storage, arena = self.runner.storage, self.runner.arena
        for extent in self.extents:
            start = extent.valid_len
            target = arena.segments(extent, 0, start, start + 1)
            source = arena.segments(extent, 0, 0, start + 1)
            for layer in range(len(storage.layers)):
                storage.write(layer, target, self.fresh, self.fresh)
                storage.views(layer, source)
            extent.advance(start + 1)

    def step(self) -> None:
        self.runner.forward([Span(extent, extent.valid_len, [1], 1) for extent in self.extents])


class _InCache(_Subject):
    def __init__(self, model: Any, cache: Any, batch: int, length: int, held: int) -> None:
        self.model, self.cache, self.length = model, cache, length
        config = model.config
        shape = (batch, config.num_key_value_heads, length, config.head_dim)
        for layer in range(config.num_hidden_layers):
            filling = torch.randn(shape, dtype=model.dtype, device=model.device)
            cache.update(filling, filling.clone(), layer)
        self.fresh = torch.randn(
            (batch, config.num_key_value_heads, 1, config.head_dim),
            dtype=model.dtype,
            device=model.device,
        )
        self.ids = torch.ones((batch, 1), dtype=torch.long, device=model.device)
        elements = batch * config.num_key_value_heads * config.head_dim * held
        self.kv = 2 * config.num_hidden_layers * elements * model.dtype.itemsize

    def append(self) -> None:
        for layer in range(self.model.config.num_hidden_layers):
            self.cache.update(self.fresh, self.fresh, layer)

    def step(self) -> None:
        self.model(self.ids, past_key_values=self.cache, use_cache=True)


def _subject(cache: str, model: Any, batch: int, length: int, steps: int) -> _Subject:
    from transformers import DynamicCache, StaticCache

    room = 2 * (steps + _WARM) + 8
    if cache == "DynamicCache":
        return _InCache(model, DynamicCache(config=model.config), batch, length, length)
    if cache == "StaticCache":
        static = StaticCache(config=model.config, max_cache_len=length + room)
        return _InCache(model, static, batch, length, length + room)
    config = model.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    runner = make_runner(
        model,
        ModelConfig(
            path="bench",
            device=str(model.device),
            arena_bytes=token * model.dtype.itemsize * batch * (length + room),
            runner="llama" if "llama" in cache else "generic",
            max_sequences=batch,
        ),
    )
    return _InArena(runner, batch, length, room)


def _take(subject: _Subject, device: torch.device, steps: int) -> dict[str, Any]:
    result: dict[str, Any] = {"append": _median(subject.append, device, steps)}
    with _peak(device) as peak:
        result["step"] = _median(subject.step, device, steps)
    return result | {"memory": peak[0], "kv": subject.kv}


def _median(call: Callable[[], None], device: torch.device, steps: int) -> float:
    times = []
    for number in range(steps + _WARM):
        _wait(device)
        began = time.perf_counter()
        call()
        _wait(device)
        if number >= _WARM:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextmanager
def _peak(device: torch.device) -> Iterator[list[int | None]]:
    """Yields a list whose one entry becomes the bytes needed beyond those held at the start."""
    found: list[int | None] = [None]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found[0] = torch.cuda.max_memory_allocated(device) - before
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of resident memory
        held = _status("VmRSS")
        yield found
        found[0] = max(0, _status("VmHWM") - held)
    except OSError:
        yield found


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field}")


def _model(
    layers: int, hidden: int, positions: int, dtype: torch.dtype, device: torch.device
) -> Any:
    """A random Llama with grouped queries, head size 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = hidden // 64
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=64,
        max_position_embeddings=positions + 1024,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(device=device, dtype=dtype).eval()
