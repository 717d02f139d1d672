"""Linear layers of many rows on any chip: ``linear_many.cu``, with the bits of ``linear.cu``.

``linear.cuh`` has the order of the sums. How the work is cut into tiles changes no bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.kernels.linear_shapes import Epilogue, shared_limit
from outrider.kernels.operation import Tools


@dataclass(frozen=True, slots=True)
class Square:
    """What a thread block multiplies at a time: ``rows`` of x with ``columns`` rows of w."""

    rows: int
    columns: int

    @property
    def stage(self) -> int:
        """Bytes of one stage of the ring: 64 k of both."""
        return (self.rows + self.columns) * 128


SQUARES = (Square(128, 128), Square(64, 128), Square(64, 64))


def depth_of(square: Square, arch: int) -> tuple[int, int]:
    """(stages of the ring, thread blocks per multiprocessor) that fit this chip.

    Two blocks, of which one stores while the other multiplies, where each has room for three
    stages, and registers: not with the largest tile.
    """
    if arch < 80:
        return 2, 1
    one = shared_limit(arch)
    # Each block takes one KiB more of the multiprocessor than it may use.
    two = (one - 1024) // 2
    if square.rows * square.columns <= 64 * 128 and two >= 3 * square.stage:
        return min(4, two // square.stage), 2
    return min(4, one // square.stage), 1


def pick(rows: int, columns: int, processors: int) -> Square:
    """The tile with which the busiest multiprocessor is done first.

    A tile's time is estimated as that of its products plus that of bringing its rows in, which
    are alike at 32 + 32 rows. ``columns``: rows of w.
    """

    def time(square: Square) -> int:
        tiles = -(-rows // square.rows) * -(-columns // square.columns)
        cost = square.rows * square.columns + 32 * (square.rows + square.columns)
        return -(-tiles // processors) * cost

    return min(SQUARES, key=time)


class ManyLinear:
    """Linear layers of any number of rows, with the arguments of ``linear``."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    def __call__(
        self,
        *,
        x: Tensor,
        w: Tensor,
        out: Tensor,
        rows: int,
        epilogue: Epilogue = Epilogue.STORE,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        overlap: bool = False,
        square: Square | None = None,
    ) -> None:
        """See ``linear.reference``; x is normalised already. ``square``: not the best, but this."""
        n, k = w.shape
        compiler, processors = self._tools.compiler, self._tools.processors
        square = square or pick(rows, n, processors)
        stages, blocks = depth_of(square, compiler.arch)
        defines = {
            "BF16": int(w.dtype == torch.bfloat16),
            "BLOCK_M": square.rows,
            "BLOCK_N": square.columns,
            "STAGES": stages,
            "MIN_BLOCKS": blocks,
            "EPILOGUE": int(epilogue),
        }
        kernel = compiler.kernel(
            "linear_many", "linear_many", defines, threads=256, shared=stages * square.stage
        )
        pair = 2 if epilogue == Epilogue.GATED else 1
        tiles = -(-rows // square.rows) * -(-(n // pair) // (square.columns // pair))
        grid = min(tiles, processors * blocks)
        kernel.launch((grid,), (x, w, bias, residual, out, rows, n, k), overlap=overlap)
