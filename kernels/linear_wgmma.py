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
    a cluster of ``split`` blocks: 1, 4 or 8. ``peers``: blocks of a cluster, 1 or 2, that fetch the
    same rows of w once for all, each with its own rows of x; not along with ``split``.
    """

    consumers: int
    stages: int
    split: int = 1
    peers: int = 1

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
        return {
            "CONSUMERS": self.consumers,
            "STAGES": self.stages,
            "SPLIT": self.split,
            "PEERS": self.peers,
        }


def shared_bytes(tile: WgmmaTile) -> int:
    """Shared memory of one block: the ring or the sums in its place, its barriers, and what its
    alignment may take."""
    ring = tile.stages * (tile.rows + FEATURES) * 128
    sums = 0 if tile.split == 1 else 8 // tile.split * tile.rows * (FEATURES + 8) * 4
    return max(ring, sums) + tile.stages * 16 + 1024


def best_tile(rows: int, columns: int, processors: int) -> WgmmaTile:
    """``columns``: rows of w. What measured best on an H100 (docs/results/many-rows.md)."""
    if rows <= 64:
        return WgmmaTile(1, 8)
    large = -(-rows // 128) * -(-columns // FEATURES)
    return WgmmaTile(2, 6) if large >= processors else WgmmaTile(1, 8)


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
        across = -(-n // FEATURES) if not gated else -(-n // 2 // (FEATURES // 2))
        blocks = tile.split * tile.peers  # of a cluster
        clusters = -(-rows // (tile.rows * tile.peers)) * across
        if tile.split == 1:
            clusters = min(clusters, processors // blocks)
        halves = gated or tile.peers > 1
        kernel.launch(
            (clusters * blocks,),
            (
                compiler.tile_map(x, tile.rows),
                compiler.tile_map(w, FEATURES // 2 if halves else FEATURES),
                bias, residual, out, rows, n, k,
            ),
            overlap=overlap,
        )  # fmt: skip
