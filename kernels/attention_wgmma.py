"""Attention of spans of many rows on Hopper: ``attention_wgmma.cu``."""

from __future__ import annotations

from outrider.kernels.attention_shapes import MAX_BATCH, Heads

_CUT = 64
_TABLE = 32 * MAX_BATCH
"""Bytes of what the kernel knows of the sequences, and of the ints by which it orders them."""


def takes(heads: Heads, arch: int, chip: int) -> bool:
    """Whether the kernel is made for such heads and runs as code for ``arch`` on ``chip``."""
    return arch == chip == 90 and heads.head_dim in (64, 128) and heads.cut == _CUT


def defines() -> dict[str, int]:
    """How the kernel is cut, for what the registers and the shared memory hold."""
    return {"CONSUMERS": 2, "STAGES": 4}


def tile(cut: dict[str, int]) -> int:
    """Queries of a KV head that a block takes at a time."""
    return 64 * cut["CONSUMERS"]


def threads(cut: dict[str, int]) -> int:
    """Threads of a block: those that multiply, and a group of four warps that fetch."""
    return 128 * (cut["CONSUMERS"] + 1)


def shared_bytes(heads: Heads, cut: dict[str, int]) -> int:
    """Shared memory of one block: the ring, the queries, the barriers, the table of sequences, and
    what its alignment may take."""
    rows = 2 * cut["STAGES"] * heads.cut + tile(cut)
    return 2 * rows * heads.head_dim + 16 * (cut["STAGES"] + cut["CONSUMERS"]) + _TABLE + 1024
