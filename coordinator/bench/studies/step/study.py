"""``outrider bench step``: how long the steps of one model take, against its memory's speed.

Decode, verify and draft-loop rounds run through the runner that a model process would use, host
work and the wait for the tokens included; then whole prompts, and each operation by itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from outrider.coordinator.bench import hardware
from outrider.coordinator.bench.studies.step.prompts import (
    PromptFigure,
    measure_prompts,
    product_speed,
    prompt,
    sizes,
    table,
)
from outrider.shared.config.argument_types import several, whole
from outrider.shared.config.schema import Config


@dataclass(frozen=True, slots=True)
class Figure:
    """One kind of round. ``tokens``: new tokens a round is good for, ``seconds`` its median."""

    kind: str
    sequences: int
    rows: int
    tokens: int
    seconds: float
    ceiling_seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second, all sequences together."""
        return self.tokens / self.seconds

    @property
    def share(self) -> float:
        """Of the ceiling: weight bytes over copy bandwidth, over the time taken."""
        return self.ceiling_seconds / self.seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    counts = several(whole(1))
    parser.add_argument(
        "--model", default="planted:llama-3.2-3b",
        help="folder, hub id, or planted:SHAPE for one built in memory",
    )  # fmt: skip
    parser.add_argument("--step-device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--step-dtype", default="auto", help="auto, float32, float16 or bfloat16")
    parser.add_argument("--runner", choices=("auto", "llama", "generic"), default="auto")
    parser.add_argument("--context", type=int, default=64, help="prompt tokens (default: 64)")
    parser.add_argument("--new", type=int, default=256, help="new tokens decoded (default: 256)")
    parser.add_argument("--rows", type=counts, default=[2, 3, 5, 9], help="of a verify")
    parser.add_argument("--batches", type=counts, default=[1, 8, 32], help="sequences at once")
    parser.add_argument("--draft-ks", type=counts, default=[1, 2, 4], help="of a draft loop")
    parser.add_argument(
        "--prompt-rows", default="", help="whole prompts, as 1024,8x2048: 8 of 2,048 at once"
    )
    parser.add_argument("--parts", type=counts, default=[1], help="sequences of the operations")
    parser.add_argument("--arena", type=int, default=8 << 30, help="bytes of KV (default: 8 GiB)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")


def run(args: argparse.Namespace, config: Config) -> int:
    """Measures and prints; returns the exit status."""
    import torch

    runner, shape, model = _runner(args)
    device = runner.storage.device
    bandwidth = _bandwidth(device)
    step_bytes = _step_bytes(runner, shape)
    largest = max([max(args.rows) - 1, *args.draft_ks])
    with torch.inference_mode():
        figures = measure(runner, args, step_bytes / bandwidth if bandwidth else 0.0)
        cuda = type(runner).__name__ == "CudaRunner"
        parts = {n: _parts(runner, args, n) for n in args.parts} if cuda else {}
        prompts = _prompts(runner, shape, model, args)
    facts = runner.facts
    print(
        f"{facts.name} ({facts.architecture}) on {device}, {facts.dtype}, runner {facts.runner}; "
        f"{step_bytes / 1e9:.3f} GB read per step, copy bandwidth "
        f"{bandwidth / 1e12:.3f} TB/s; K up to {largest}\n"
    )
    print(_table(figures))
    if prompts:
        print(table(prompts))
    for count, found in parts.items():
        print(_parts_table(count, found, bandwidth))
    if args.json:
        record = {
            **hardware.provenance(),
            "device": _device_name(device),
            "model": asdict(facts),
            "step_bytes": step_bytes,
            "copy_bandwidth": bandwidth,
            "figures": [asdict(f) | {"rate": f.rate, "share": f.share} for f in figures],
            "prompts": [asdict(f) | {"rate": f.rate, "share": f.share} for f in prompts],
            "parts": [
                asdict(part) | {"sequences": count}
                for count, found in parts.items()
                for part in found
            ],
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def measure(runner: Any, args: argparse.Namespace, ceiling: float) -> list[Figure]:
    """Every kind of round that was asked for; ``ceiling`` is seconds of one step."""
    figures = []
    for count in args.batches:
        rounds = _StepRounds(runner, count, args.context, args.new + 64)
        seconds = rounds.decode(args.new)
        figures.append(Figure("decode", count, 1, count, seconds, ceiling))
        rounds.close()
    rounds = _StepRounds(runner, 1, args.context + args.new // 2, 64)
    for rows in args.rows:
        seconds = rounds.repeat(lambda r=rows: rounds.verify(r))  # type: ignore[misc]
        figures.append(Figure("verify", 1, rows, 1, seconds, ceiling))
    for k in args.draft_ks:
        seconds = rounds.repeat(lambda k=k: rounds.draft(k))  # type: ignore[misc]
        figures.append(Figure("draft loop", 1, k, k, seconds, k * ceiling))
    rounds.close()
    return figures


class _StepRounds:
    """Sequences of one runner, and rounds over them."""

    def __init__(self, runner: Any, count: int, context: int, room: int) -> None:
        from outrider.shared.core.types import Decoding
        from outrider.shared.model.runner import Span

        self._runner, self._span, self._greedy = runner, Span, Decoding()
        self._extents = [runner.arena.admit(context + room) for _ in range(count)]
        tokens = prompt(context, runner.facts.vocab_size)
        self._last = [1] * count
        for extent in self._extents:
            runner.forward([Span(extent, 0, tokens, 0)])

    def decode(self, steps: int) -> float:
        """Median seconds of a step of one row a sequence, positions moving on."""
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            self._last = [token for _, token in self._judge([[t] for t in self._last], 0)]
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    def verify(self, rows: int) -> None:
        """One verify of ``rows`` rows a sequence, taken back."""
        self._judge([[t] + [0] * (rows - 1) for t in self._last], rows - 1)
        self._back(rows)

    def draft(self, k: int) -> None:
        """One proposal of ``k`` tokens a sequence, taken back."""
        spans = self._spans([[t] for t in self._last])
        found = self._runner.propose(spans, [self._greedy] * len(spans), [k] * len(spans))
        if found is not None:
            self._back(k)
            return
        token = self._last
        for _ in range(k):
            token = self._forward(self._spans([[t] for t in token]), 1)
        self._back(k)

    def repeat(self, call: Callable[[], None], times: int = 50) -> float:
        """Median seconds of a call, after warming up."""
        for _ in range(3):
            call()
        taken = []
        for _ in range(times):
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    def close(self) -> None:
        """Frees the sequences."""
        for extent in self._extents:
            self._runner.arena.free(extent)

    def _spans(self, rows: Sequence[Sequence[int]]) -> list[Any]:
        return [
            self._span(extent, extent.valid_len, own, 1)
            for extent, own in zip(self._extents, rows, strict=True)
        ]

    def _judge(self, rows: Sequence[Sequence[int]], k: int) -> list[tuple[int, int]]:
        spans = self._spans(rows)
        found = self._runner.judge(
            spans, [self._greedy] * len(spans), [own[len(own) - k :] for own in rows]
        )
        if found is not None:
            return list(found)
        for span, own in zip(spans, rows, strict=True):
            span.wanted = len(own)
        tokens = self._forward(spans, len(rows[0]))
        return [(0, token) for token in tokens]

    def _forward(self, spans: Sequence[Any], rows: int) -> list[int]:
        logits = self._runner.forward(spans)
        chosen: list[int] = logits.argmax(-1)[::rows].tolist()
        return chosen

    def _back(self, rows: int) -> None:
        for extent in self._extents:
            self._runner.arena.rollback(extent, extent.valid_len - rows)


def _runner(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The runner, the model's configuration, and transformers' own model where it is planted."""
    from outrider.shared.config.schema import ModelConfig
    from outrider.shared.model.loading import choose_device, load_runner, make_runner
    from outrider.shared.model.locate import model_path

    config = ModelConfig(
        path=args.model, device=args.step_device, dtype=args.step_dtype, runner=args.runner,
        arena_bytes=args.arena, max_k=max([16, *args.draft_ks]), max_sequences=64,
    )  # fmt: skip

    def progress(message: str) -> None:
        print(message, file=sys.stderr)

    if not args.model.startswith("planted:"):
        from transformers import AutoConfig

        runner = load_runner(config, progress)
        return runner, AutoConfig.from_pretrained(model_path(args.model)), None
    from outrider.coordinator.bench.models.planted import PlantSpec, plant

    device = choose_device(args.step_device)
    dtype = args.step_dtype
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    model = plant(PlantSpec(args.model.removeprefix("planted:"), dtype=dtype), device, progress)
    return make_runner(model, config, "", progress), model.config, model


def _step_bytes(runner: Any, shape: Any) -> int:
    """Weight bytes of a step: all but the embedding table, of which it reads a few rows."""
    table = 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
    return int(runner.facts.weight_bytes - table * runner.storage.dtype.itemsize)


def _prompts(runner: Any, shape: Any, model: Any, args: argparse.Namespace) -> list[PromptFigure]:
    shapes = sizes(args.prompt_rows)
    if not shapes:
        return []
    speed = product_speed(runner.storage.device, runner.storage.dtype)
    return measure_prompts(runner, shape, model, shapes, speed)


def _parts(runner: Any, args: argparse.Namespace, count: int) -> list[Any]:
    import torch

    from outrider.coordinator.bench.studies.step.profile import parts
    from outrider.shared.model.cuda.forward import Batch

    def new(values: list[int]) -> Any:
        return torch.tensor(values, dtype=torch.int32, device=runner.storage.device)

    extents = [runner.arena.admit(args.context + args.new + 8) for _ in range(count)]
    places = [[start for start, _ in extent.places] for extent in extents]
    starts = new([start for pool in zip(*places, strict=True) for start in pool])
    positions = new([args.context + args.new // 2] * count)
    batch = Batch(
        new([1] * count), starts.view(-1, count), new(list(range(count))), new([1] * count),
        positions,
    )  # fmt: skip
    found = parts(runner._step, batch, count, count, 1)
    for extent in extents:
        runner.arena.free(extent)
    return found


def _bandwidth(device: Any) -> float:
    if device.type == "cuda":
        from outrider.coordinator.bench.studies.step.profile import copy_bandwidth

        return copy_bandwidth(device)
    from outrider.shared.core.host import read_bandwidth

    return read_bandwidth(str(device))


def _device_name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _table(figures: Sequence[Figure]) -> str:
    lines = [
        "| round | sequences | rows | ms | tokens/s | share of ceiling |",
        "|---|---|---|---|---|---|",
    ]
    for f in figures:
        rate = f"{f.rate:,.0f}" if f.kind != "verify" else ""
        lines.append(
            f"| {f.kind} | {f.sequences} | {f.rows} | {f.seconds * 1e3:.3f} | {rate} "
            f"| {100 * f.share:.0f} % |"
        )
    return "\n".join(lines) + "\n"


def _parts_table(sequences: int, parts: Sequence[Any], bandwidth: float) -> str:
    lines = [
        f"| {sequences} × 1 row, all layers | launches | MB | µs | of copy bandwidth |",
        "|---|---|---|---|---|",
    ]
    for p in parts:
        share = f"{100 * p.weight_bytes / p.seconds / bandwidth:.0f} %" if p.weight_bytes else ""
        lines.append(
            f"| {p.name} | {p.launches} | {p.weight_bytes / 1e6:.1f} | {p.seconds * 1e6:.1f} "
            f"| {share} |"
        )
    alone = sum(p.seconds for p in parts[:-1])
    saved = alone - parts[-1].seconds
    lines.append(
        f"\nAlone the operations sum to {alone * 1e6:.0f} µs; in one chain the seams "
        f"{'save' if saved >= 0 else 'cost'} {abs(saved) * 1e6:.0f} µs."
    )
    return "\n".join(lines) + "\n"
