"""Linear layers of many rows on any chip: ``linear_many.cu``, with the bits of ``linear.cu``.

``linear.cuh`` has the order of the sums; how the work is cut into tiles changes no bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.kernels.linear_shapes import Epilogue, shared_limit
from outrider.kernels.operation import Tools


@dataclass(frozen=True, slots=True)
class BlockTile:
    """What a thread block multiplies at a time: ``rows`` of x with ``columns`` rows of w."""

    rows: int
    columns: int

    @property
    def stage(self) -> int:
        """Bytes of one stage of the ring: 64 k of both."""
        return (self.rows + self.columns) * 128


BLOCK_TILES = (BlockTile(128, 128), BlockTile(64, 128), BlockTile(64, 64))


def depth_of(tile: BlockTile, arch: int, chip: int | None = None) -> tuple[int, int]:
    """(stages of the ring, thread blocks per multiprocessor) that fit this chip.

    Two blocks, of which one stores while the other multiplies, where each has room for three
    stages, and registers: not with the largest tile. See ``linear_shapes.shared_limit``.
    """
    if arch < 80:
        return 2, 1
    one = shared_limit(arch, chip)
    # Each block takes one KiB more of the multiprocessor than it may use.
    two = (one - 1024) // 2
    if tile.rows * tile.columns <= 64 * 128 and two >= 3 * tile.stage:
        return min(4, two // tile.stage), 2
    return min(4, one // tile.stage), 1


def best_tile(rows: int, columns: int, processors: int) -> BlockTile:
    """The tile with which the busiest multiprocessor is done first.

    A tile's time is estimated as that of its products plus that of bringing its rows in, which
    are alike at 32 + 32 rows. ``columns``: rows of w.
    """

    def time(tile: BlockTile) -> int:
        tiles = -(-rows // tile.rows) * -(-columns // tile.columns)
        cost = tile.rows * tile.columns + 32 * (tile.rows + tile.columns)
        return -(-tiles // processors) * cost

    return min(BLOCK_TILES, key=time)


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
        tile: BlockTile | None = None,
    ) -> None:
        """See ``linear.reference``; x is normalised already. ``tile``: not the best, but this."""
        n, k = w.shape
        compiler, processors = self._tools.compiler, self._tools.processors
        tile = tile or best_tile(rows, n, processors)
        stages, blocks = depth_of(tile, compiler.arch, compiler.chip)
        defines = {
            "BF16": int(w.dtype == torch.bfloat16),
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.columns,
            "STAGES": stages,
            "MIN_BLOCKS": blocks,
            "EPILOGUE": int(epilogue),
        }
        kernel = compiler.kernel(
            "linear_many", "linear_many", defines, threads=256, shared=stages * tile.stage
        )
        pair = 2 if epilogue == Epilogue.GATED else 1
        tiles = -(-rows // tile.rows) * -(-(n // pair) // (tile.columns // pair))
        grid = min(tiles, processors * blocks)
        kernel.launch((grid,), (x, w, bias, residual, out, rows, n, k), overlap=overlap)
