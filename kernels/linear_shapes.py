"""What a linear layer may be asked for: its epilogue, its rows, how the work is cut."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

FEW_ROWS = 64
"""Rows up to which a linear layer is bound by reading its weights alone."""


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


_LIMITS = {75: 64, 80: 163, 87: 163, 90: 227, 100: 227, 103: 227}
"""KiB of shared memory that one block may have; of chips that are not named, 99."""


def shared_limit(arch: int, chip: int | None = None) -> int:
    """Bytes of shared memory that one block may have.

    ``arch``: what the code is compiled for; ``chip``: what it runs on, where that is another.
    """
    return min(_LIMITS.get(one, 99) for one in (arch, chip or arch)) * 1024
