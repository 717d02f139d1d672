"""What the CPU kernels are compiled for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KernelShape:
    """Everything that is a constant in the compiled code.

    ``weights``, ``cache``: element types of the weights and of the KV, ``float32``, ``bfloat16``
    or ``float16``. ``columns``: outputs that are summed side by side, a multiple of 16; ``rows``:
    rows that share one reading of a weight. Neither of the last two changes a result: they say
    what fits the processor's registers.
    """

    weights: str
    cache: str
    head_dim: int
    columns: int
    rows: int = 6


def columns_for(lanes: int) -> int:
    """Columns for a processor whose registers hold so many floats.

    Six rows take 24 of 32 registers for their sums where there are as many (AVX-512, NEON), 12
    of 16 where there are not.
    """
    return {16: 64, 8: 16, 4: 16}[lanes]


def padded(count: int, columns: int) -> int:
    """``count`` up to whole panels."""
    return -(-count // columns) * columns
