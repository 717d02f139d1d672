"""What a linear layer may be asked for: its epilogue, its rows, how the work is cut."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

MAX_ROWS = 64


class Epilogue(IntEnum):
    """What becomes of the sums; the numbers of linear.cu."""

    STORE = 0
    """out = y, in the type of x."""
    STORE_FLOAT = 1
    """out = y, float32."""
    RESIDUAL = 2
    """out = residual + y."""
    GATED = 3
    """w holds gate rows, then up rows: out = silu(gate) * up."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How the CUDA kernel cuts its work; none of it changes a result.

    ``units``: groups of eight columns summed at a time, an even number for ``GATED``; ``stages``:
    of the ring, each 64 k of all units; ``blocks``: thread blocks per multiprocessor.
    """

    units: int = 4
    stages: int = 3
    blocks: int = 1


PLAIN = Tile()


def shared_limit(arch: int) -> int:
    """Bytes of shared memory that one block may have on this chip."""
    return {75: 64, 80: 163, 90: 227}.get(arch, 99) * 1024
