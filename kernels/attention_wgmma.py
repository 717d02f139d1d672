"""Attention of spans of many rows on Hopper: ``attention_wgmma.cu``."""

from __future__ import annotations

from outrider.kernels.attention_shapes import MAX_BATCH, Heads

_CUT = 64
_CONSUMERS = 2
_STAGES = 4
TILE = 64 * _CONSUMERS
"""Queries of a KV head that a block takes at a time."""
THREADS = 128 * (_CONSUMERS + 1)
"""Of a block: those that multiply, and a group of four warps that fetch."""
_TABLE = 32 * MAX_BATCH
"""Bytes of what the kernel knows of the sequences, and of the ints by which it orders them."""


def takes(heads: Heads, arch: int, chip: int) -> bool:
    """Whether the kernel is made for such heads and runs as code for ``arch`` on ``chip``."""
    return arch == chip == 90 and heads.head_dim in (64, 128) and heads.cut == _CUT


def shared_bytes(heads: Heads) -> int:
    """Shared memory of one block: the ring, the queries, the barriers, the table of sequences, and
    what its alignment may take."""
    rows = 2 * _STAGES * _CUT + TILE
    return 2 * rows * heads.head_dim + 16 * (_STAGES + _CONSUMERS) + _TABLE + 1024
