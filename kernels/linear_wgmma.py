"""Linear layers of many rows on Hopper: ``linear_wgmma.cu``, with the bits of ``linear.cu``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.kernels.linear_shapes import Epilogue
from outrider.kernels.operation import Tools

FEATURES = 128
"""Rows of w in a tile."""


@dataclass(frozen=True, slots=True)
class WgmmaTile:
    """What thread blocks multiply at a time; it changes no bit.

    64 ``consumers`` rows of x with 128 rows of w. The eight slices of k of a tile are split over
    a cluster of ``split`` blocks: 1, 4 or 8.
    """

    consumers: int
    stages: int
    split: int = 1

    @property
    def rows(self) -> int:
        """Rows of x."""
        return 64 * self.consumers

    @property
    def threads(self) -> int:
        """Of a block: 128 a consumer, and those that fetch: a warp, or a group of four warps that
        gives its registers to two consumers."""
        return 160 if self.consumers == 1 else 384

    @property
    def defines(self) -> dict[str, int]:
        """Those of the kernel's that say how the work is cut."""
        return {"CONSUMERS": self.consumers, "STAGES": self.stages, "SPLIT": self.split}


def shared_bytes(tile: WgmmaTile) -> int:
    """Shared memory of one block: the ring or the sums in its place, its barriers, and what its
    alignment may take."""
    ring = tile.stages * (tile.rows + FEATURES) * 128
    sums = 0 if tile.split == 1 else 8 // tile.split * tile.rows * (FEATURES + 8) * 4
    return max(ring, sums) + tile.stages * 16 + 1024


def best_tile(rows: int, columns: int, processors: int) -> WgmmaTile:
    """``columns``: rows of w. As measured on an H100 (docs/results/many-rows.md).

    A tile of 128 rows takes 1.4 times as long as one of 64, and each processor takes one at a
    time. A single row of few tiles leaves most of them idle, and memory with them: its tiles are
    split.
    """
    across = _across(columns)
    if rows <= 64 and _splits(across, processors):
        return WgmmaTile(1, 6, 4)
    small, large = WgmmaTile(1, 8), WgmmaTile(2, 6)

    def waves(tile: WgmmaTile) -> int:
        return -(-(-(-rows // tile.rows) * across) // processors)

    return large if 1.4 * waves(large) < waves(small) else small


def worth(rows: int, columns: int, processors: int) -> bool:
    """Whether it beats ``linear.cu`` at up to 64 rows, as measured on an H100.

    Up to 16 rows it does not, since ``linear.cu`` has the norm in it. Beyond, wide layers have
    tiles for enough processors to keep memory busy. Narrow ones are split, and the parts' sums
    take as long to exchange as linear.cu takes for 48 rows.
    """
    across = _across(columns)
    wide = across >= 0.3 * processors
    return rows > 16 and (wide or (rows > 48 and _splits(across, processors)))


def _across(columns: int) -> int:
    """Tiles beside each other."""
    return -(-columns // FEATURES)


def _splits(across: int, processors: int) -> bool:
    """Whether there is room for four parts of each tile at once."""
    return 4 * across <= 0.75 * processors


class WgmmaLinear:
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
        tile: WgmmaTile | None = None,
    ) -> None:
        """See ``linear.reference``; x is normalised already. ``tile``: not the best, but this."""
        n, k = w.shape
        compiler, processors = self._tools.compiler, self._tools.processors
        tile = tile or best_tile(rows, n, processors)
        gated = epilogue == Epilogue.GATED
        defines = {
            "BF16": int(w.dtype == torch.bfloat16),
            **tile.defines,
            "EPILOGUE": int(epilogue),
        }
        kernel = compiler.kernel(
            "linear_wgmma", "linear_wgmma", defines, threads=tile.threads,
            shared=shared_bytes(tile),
        )  # fmt: skip
        tiles = -(-rows // tile.rows) * _across(n)
        kernel.launch(
            (min(tiles, processors) if tile.split == 1 else tiles * tile.split,),
            (
                compiler.tile_map(x, tile.rows),
                compiler.tile_map(w, FEATURES // 2 if gated else FEATURES),
                bias, residual, out, rows, n, k,
            ),
            overlap=overlap,
        )  # fmt: skip
