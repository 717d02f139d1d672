"""Attention over the arena in CUDA: one launch where a sequence brings few rows, two for many.

All kernels give a row the same bits; see ``attention.cuh``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from outrider.kernels import attention_wgmma
from outrider.kernels.attention_shapes import MAX_BATCH, Heads, Work, many
from outrider.kernels.operation import Call, Tools

_THREADS = 128
_WARPS = 4
_TABLE = 28 * MAX_BATCH
"""Bytes of what the kernels know of the sequences, in shared memory."""
_APPENDING_BLOCKS = 8
"""Thread blocks of ``append`` per multiprocessor."""


def few_rows_shared(heads: Heads) -> int:
    """Shared memory of one block of ``attention.cu``, in bytes."""
    tiles = 2 * heads.cut * heads.head_dim + 16 * heads.head_dim + 16 * heads.cut
    return 2 * tiles + 5 * 4 * 16 * _WARPS + _TABLE + 16


def many_rows_defines(heads: Heads, arch: int) -> dict[str, int]:
    """How ``attention_many.cu`` is cut for a chip: what its registers and shared memory hold."""
    roomy = arch >= 80
    return {
        "ROW_TILES": 2 if roomy and heads.head_dim <= 128 else 1,
        "STAGES": 2 if roomy and heads.head_dim <= 128 else 1,
        "BLOCKS": 1 if not roomy else 3 if heads.head_dim <= 64 else 2,
    }


def many_rows_tile(defines: dict[str, int]) -> int:
    """Queries of a KV head that a block of ``attend`` takes at a time."""
    return 16 * _WARPS * defines["ROW_TILES"]


def many_rows_shared(heads: Heads, defines: dict[str, int]) -> int:
    """Shared memory of one block of ``attend``, in bytes."""
    rows = many_rows_tile(defines) + 2 * defines["STAGES"] * heads.cut
    return 2 * rows * heads.head_dim + _TABLE + 4 * MAX_BATCH


def launcher(tools: Tools) -> Call:
    """See ``attention.reference``; where rows are many, queries in ``qkv`` are rotated in place."""

    def run(
        *,
        qkv: Tensor,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        starts: Tensor,
        first_rows: Tensor,
        row_counts: Tensor,
        positions: Tensor,
        offset: int,
        sequences: int,
        rows: int,
        rope: Tensor,
        heads: Heads,
        work: Work,
        prefix_starts: Tensor | None = None,
        prefix_lens: Tensor | None = None,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 1e-6,
        blocks: int = 2,
        overlap: bool = False,
    ) -> None:
        defines = {
            "BF16": int(qkv.dtype == torch.bfloat16),
            "HEAD_DIM": heads.head_dim,
            "TOKENS": heads.cut,
        }
        scale = math.log2(math.e) / math.sqrt(heads.head_dim)
        where = (starts, prefix_starts, prefix_lens, first_rows, row_counts, positions, offset)
        if not many(rows):
            kernel = tools.compiler.kernel(
                "attention", "attention", defines, threads=_THREADS, shared=few_rows_shared(heads)
            )
            arguments = (
                qkv, keys, values, out, *where, rope, q_norm, k_norm, eps, work.partial,
                work.stats, work.arrived, sequences, heads.heads, heads.kv_heads,
                rows * heads.group, heads.window, heads.ring, scale,
            )  # fmt: skip
            kernel.launch((tools.processors * blocks,), arguments, overlap=overlap)
            return
        cut = many_rows_defines(heads, tools.compiler.arch)
        append = tools.compiler.kernel(
            "attention_many", "append", defines | cut, threads=_THREADS, shared=_TABLE
        )
        appended = (
            qkv, keys, values, *where, rope, q_norm, k_norm, eps, sequences, heads.heads,
            heads.kv_heads, heads.ring,
        )  # fmt: skip
        grid = min(tools.processors * _APPENDING_BLOCKS, sequences * rows)
        append.launch((grid,), appended, overlap=overlap)
        seen = (sequences, heads.heads, heads.kv_heads, heads.window, heads.ring, scale)
        if attention_wgmma.takes(heads, tools.compiler.arch, tools.compiler.chip):
            attend = tools.compiler.kernel(
                "attention_wgmma", "attend", defines, threads=attention_wgmma.THREADS,
                shared=attention_wgmma.shared_bytes(heads),
            )  # fmt: skip
            maps = [
                tools.compiler.tile_map(part.view(len(part), -1), heads.cut)
                for part in (keys, values)
            ]
            tile, most = attention_wgmma.TILE, tools.processors
            attended = (qkv, keys, values, *maps, out, *where, *seen)
        else:
            attend = tools.compiler.kernel(
                "attention_many", "attend", defines | cut, threads=_THREADS,
                shared=many_rows_shared(heads, cut),
            )  # fmt: skip
            tile, most = many_rows_tile(cut), tools.processors * cut["BLOCKS"]
            attended = (qkv, keys, values, out, *where, *seen)
        items = sequences * heads.kv_heads * -(-rows * heads.group // tile)
        attend.launch((min(most, items),), attended, overlap=overlap)

    return run
