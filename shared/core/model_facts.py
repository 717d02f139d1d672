"""What a model is, told once: from where it is loaded to Info, profile and report.

``ModelFacts`` and the message ``ModelDescription`` name the same things alike; the message adds
how full the arena is. A new fact is a field of each.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from outrider.protos import generation_pb2 as pb


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model is; ``weight_bytes`` counts shared storage once.

    A draft may be none: it proposes from the text alone. Then there are no parameters, and
    ``vocab_size`` is 0: it has no vocabulary that could be another than the base's.
    """

    name: str
    architecture: str
    parameters: int
    weight_bytes: int
    vocab_size: int
    vocab_fingerprint: str
    max_positions: int
    device: str
    dtype: str
    eos_token_ids: tuple[int, ...]
    runner: str
    kernels: str = ""
    """What they were chosen to be on this machine, in words; empty where there are none."""

    @property
    def is_model(self) -> bool:
        """Whether there is one."""
        return self.vocab_size > 0


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """A model with its arena, now. Token counts are slots of the arena."""

    facts: ModelFacts
    arena_tokens: int
    arena_tokens_used: int
    """Of live sequences."""
    arena_tokens_cached: int
    """Of cached sequences, which give way to live ones."""
    arena_tokens_largest_free: int
    arena_longest: int
    """Slots that the longest sequence may ask for."""
    sequences: int
    """Live ones."""
    cached: int
    """Sequences that are over and whose KV is cached."""
    max_k: int


def write_description(info: EngineInfo) -> pb.ModelDescription:
    """The model of ``info`` as a message."""
    return pb.ModelDescription(
        **asdict(info.facts),
        arena_tokens=info.arena_tokens,
        arena_tokens_used=info.arena_tokens_used,
        arena_tokens_cached=info.arena_tokens_cached,
        arena_longest=info.arena_longest,
    )


def read_description(message: pb.ModelDescription) -> ModelFacts:
    """What ``message`` says of the model itself."""
    found: dict[str, Any] = {one.name: getattr(message, one.name) for one in fields(ModelFacts)}
    return ModelFacts(**found | {"eos_token_ids": tuple(message.eos_token_ids)})


def model_name(path: str) -> str:
    """A model's name without the folders of this machine, which are nobody's business."""
    return path.rstrip("/").rsplit("/", 1)[-1] if path.startswith(("/", ".")) else path
