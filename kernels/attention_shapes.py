"""The geometry of an attention layer, and the scratch memory that a call of it needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_BATCH = 64
HEAD_DIMS = (64, 128, 256)
FEW_ROWS = 32
"""Up to so many rows of one sequence the work is cut along the KV, beyond along the rows too."""


@dataclass(frozen=True, slots=True)
class Heads:
    """The geometry of one attention layer; ``window`` 0: all positions are read.

    ``ring``: size of a sliding-window sequence's ring of slots, 0: slot = start + position.
    ``cut``: positions of one unit of work; part of the numerics, the same for every forward.
    """

    heads: int
    kv_heads: int
    head_dim: int
    window: int = 0
    ring: int = 0
    cut: int = 64

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class Work:
    """Scratch memory: partial results of the cuts, and how many of a span, and spans, are done.

    ``partial`` [capacity, head_dim], ``stats`` [capacity, 4], float32; ``arrived`` int32
    [capacity + MAX_BATCH · kv_heads], zero between calls. ``capacity`` counts query rows of cuts,
    see ``need``.
    """

    partial: Tensor
    stats: Tensor
    arrived: Tensor
    capacity: int

    @classmethod
    def of(cls, heads: Heads, capacity: int, device: torch.device) -> Work:
        """Room for ``capacity`` query rows of cuts."""
        return cls(
            torch.zeros(capacity * heads.head_dim, device=device),
            torch.zeros(capacity * 4, device=device),
            torch.zeros(capacity + MAX_BATCH * heads.kv_heads, device=device, dtype=torch.int32),
            capacity,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return self.partial.nbytes + self.stats.nbytes + self.arrived.nbytes


def many(rows: int) -> bool:
    """Whether ``rows`` (the most of one sequence) are too many to cut the work along the KV."""
    return rows > FEW_ROWS


def need(heads: Heads, ends: Iterable[int], rows: int) -> int:
    """Query rows of cuts that a call takes: sequences that end at positions ``ends``, and at
    most ``rows`` rows of one sequence (all get room for as many). Many rows take none."""
    if many(rows):
        return 0
    return sum(-(-end // heads.cut) for end in ends) * heads.heads * rows
