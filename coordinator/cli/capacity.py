"""What fits on a GPU, and which K its memory's speed favours.

From the models' configurations alone: no weights are read, no GPU is needed. Memory is counted
as the services take it: weights, KV arena, workspace and graphs of each process. Speeds are
ceilings: bytes read per step over the memory's bandwidth.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outrider.coordinator.bench.models.shapes import SHAPES, ModelShape
from outrider.coordinator.telemetry.ceiling import expected_tokens
from outrider.shared.core.errors import ConfigError

GIB = 1 << 30
# Rows of one forward of the kernels, and attention's scratch memory at most.
_ROWS, _WORK_BYTES = 64, 256 << 20
# Driver, libraries and loaded code of one process that uses the GPU: seen 0.3 to 0.5 GiB.
_CONTEXT_BYTES = 450 << 20
# A captured step holds some 150 launches, and some 40 sizes are captured.
_GRAPH_BYTES = 48 << 20


@dataclass(frozen=True, slots=True)
class Gpu:
    """``memory`` bytes a program can have, ``bandwidth`` bytes per second by the datasheet.

    ``share``: of the datasheet's bandwidth that a large copy reaches.
    """

    name: str
    memory: int
    bandwidth: float
    bfloat16: bool
    share: float = 0.88


def _gpu(
    name: str, gib: float, gigabytes: float, *, bfloat16: bool = True, share: float = 0.88
) -> Gpu:
    return Gpu(name, int(gib * GIB), gigabytes * 1e9, bfloat16, share)


# Apple's memory is shared with the system; Metal lets a program have about three quarters.
GPUS = {
    "t4": _gpu("NVIDIA T4", 14.6, 320, bfloat16=False, share=0.78),
    "l4": _gpu("NVIDIA L4", 22.0, 300),
    "a100-40": _gpu("NVIDIA A100 40 GB", 39.4, 1555),
    "a100": _gpu("NVIDIA A100 80 GB", 79.1, 2039),
    "h100": _gpu("NVIDIA H100 80 GB", 79.2, 3350),
    "h200": _gpu("NVIDIA H200", 139.8, 4800, share=0.9),
    "m1": _gpu("Apple M1, 16 GB", 12, 68),
    "m1-max": _gpu("Apple M1 Max, 64 GB", 48, 400),
    "m2": _gpu("Apple M2, 16 GB", 12, 100),
    "m2-max": _gpu("Apple M2 Max, 64 GB", 48, 400),
    "m2-ultra": _gpu("Apple M2 Ultra, 128 GB", 96, 800),
    "m3": _gpu("Apple M3, 16 GB", 12, 100),
    "m3-max": _gpu("Apple M3 Max, 64 GB", 48, 400),
    "m4": _gpu("Apple M4, 16 GB", 12, 120),
    "m4-pro": _gpu("Apple M4 Pro, 48 GB", 36, 273),
    "m4-max": _gpu("Apple M4 Max, 64 GB", 48, 546),
}


@dataclass(frozen=True, slots=True)
class Model:
    """A model's size. ``weights``: bytes held, ``step_bytes``: of them read per step."""

    name: str
    shape: ModelShape
    tied: bool

    @property
    def weights(self) -> int:
        """Bytes of weights in a 16-bit type."""
        table = 2 * self.shape.vocabulary * self.shape.hidden
        learned = 2 * self.shape.positions * self.shape.hidden
        return (
            self.step_bytes
            + (0 if self.tied else table)
            + (learned if self.shape.architecture == "gpt2" else 0)
        )

    @property
    def step_bytes(self) -> int:
        """Bytes read per step, KV left out."""
        return self.shape.step_bytes

    @property
    def token_bytes(self) -> int:
        """KV bytes of one token."""
        return 4 * self.shape.layers * self.shape.kv_heads * self.shape.head_dim

    @property
    def workspace(self) -> int:
        """Bytes of a step's own buffers: rows, logits, attention's partial results."""
        s = self.shape
        inner = 2 * s.hidden + (2 * s.heads + 2 * s.kv_heads) * s.head_dim + s.intermediate
        return _ROWS * (2 * inner + 4 * s.vocabulary) + _WORK_BYTES


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that one model process takes."""

    weights: int
    arena: int
    workspace: int
    graphs: int
    context: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.arena + self.workspace + self.graphs + self.context


@dataclass(frozen=True, slots=True)
class Speed:
    """The ceiling at one K: tokens per second of one sequence, and against K = 0."""

    k: int
    tokens_per_second: float
    gain: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What fits, and how fast it could be."""

    gpu: str
    dtype: str
    memory: int
    base: Memory
    draft: Memory | None
    free: int
    fits: bool
    most_sequences: int
    speeds: tuple[Speed, ...]
    best_k: int


def plan(
    gpu: Gpu,
    base: Model,
    draft: Model | None,
    *,
    sequences: int,
    context: int,
    acceptance: float,
    max_k: int = 8,
    from_text: bool = False,
) -> Plan:
    """Memory for ``sequences`` of ``context`` tokens each, and ceilings up to ``max_k``.

    ``from_text``: proposals come from the text and take nothing of the GPU; ``draft`` is None.
    """
    models = [base] if draft is None else [base, draft]
    slots = context + max_k + 1
    used = [_memory(model, sequences, slots) for model in models]
    free = gpu.memory - sum(m.total for m in used)
    each = slots * sum(model.token_bytes for model in models)
    most = max(0, sequences + free // each)
    top_k = max_k if draft is not None or from_text else 0
    speeds = _speeds(gpu, base, draft, context, acceptance, top_k)
    return Plan(
        gpu.name,
        "bfloat16" if gpu.bfloat16 else "float16",
        gpu.memory,
        used[0],
        used[1] if draft is not None else None,
        free,
        free >= 0,
        most,
        tuple(speeds),
        max(speeds, key=lambda speed: speed.tokens_per_second).k,
    )


def _memory(model: Model, sequences: int, slots: int) -> Memory:
    return Memory(
        model.weights,
        sequences * slots * model.token_bytes,
        model.workspace,
        _GRAPH_BYTES,
        _CONTEXT_BYTES,
    )


def _speeds(
    gpu: Gpu, base: Model, draft: Model | None, context: int, acceptance: float, max_k: int
) -> list[Speed]:
    """Ceilings of one sequence half-way through its context, KV counted."""
    rate = gpu.bandwidth * gpu.share

    def step(model: Model | None) -> float:
        if model is None:
            return 0.0
        return (model.step_bytes + context // 2 * model.token_bytes) / rate

    alone = 1 / step(base)
    found = [Speed(0, alone, 1.0)]
    for k in range(1, max_k + 1):
        speed = expected_tokens(acceptance, k) / (step(base) + k * step(draft))
        found.append(Speed(k, speed, speed / alone))
    return found


def read_model(name: str) -> Model:
    """``name``: a folder with config.json, a config.json, or a shape's name.

    Raises ``ConfigError`` where it is none of these, or an architecture that isn't known.
    """
    if name in SHAPES:
        # The published checkpoints of these sizes tie the embedding, but for 8B.
        return Model(name, SHAPES[name], tied=name != "llama-3.1-8b")
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(
            f"model: got {name}; must be a folder with config.json or one of {', '.join(SHAPES)}"
        )
    return _from_config(name, json.loads(path.read_text("utf-8")))


def _from_config(name: str, fields: Mapping[str, Any]) -> Model:
    kind = fields.get("model_type")
    if kind == "gpt2":
        hidden, heads = fields["n_embd"], fields["n_head"]
        shape = ModelShape(
            "gpt2", hidden, fields["n_layer"], heads, heads, hidden // heads,
            fields.get("n_inner") or 4 * hidden, fields["vocab_size"],
            fields.get("n_positions", 1024),
        )  # fmt: skip
        return Model(name, shape, bool(fields.get("tie_word_embeddings", True)))
    if kind not in ("llama", "mistral", "qwen2", "qwen3"):
        raise ConfigError(
            f"model: {name} is a {kind}; plan knows llama, mistral, qwen2, qwen3 and gpt2"
        )
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    shape = ModelShape(
        "llama", hidden, fields["num_hidden_layers"], heads,
        fields.get("num_key_value_heads") or heads, fields.get("head_dim") or hidden // heads,
        fields["intermediate_size"], fields["vocab_size"],
        fields.get("max_position_embeddings", 2048),
    )  # fmt: skip
    return Model(name, shape, bool(fields.get("tie_word_embeddings", False)))
