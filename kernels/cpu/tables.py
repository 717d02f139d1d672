"""The tables of 64-bit words that a forward is called with: places of their entries.

An address stands as it is, a float as its bits in the lower half.
"""

from __future__ import annotations

from enum import IntEnum, auto


class _Places(IntEnum):
    @staticmethod
    def _generate_next_value_(name: str, start: int, count: int, last: list[int]) -> int:
        return count


class ModelWords(_Places):
    """Head of a model's table; ``LayerWords`` records follow. Widths are whole panels."""

    LAYERS = auto()
    HIDDEN = auto()
    HIDDEN_WIDTH = auto()
    HEADS = auto()
    KV_HEADS = auto()
    QKV_WIDTH = auto()
    MIXED = auto()
    MIXED_WIDTH = auto()
    GATED = auto()
    GATED_WIDTH = auto()
    VOCABULARY = auto()
    VOCABULARY_WIDTH = auto()
    EPS = auto()
    SCALE = auto()
    EMBEDDING = auto()
    COS = auto()
    SIN = auto()
    NORM = auto()
    HEAD = auto()
    HIDDEN_ROWS = auto()
    QKV_ROWS = auto()
    MIXED_ROWS = auto()
    GATED_ROWS = auto()
    PICKED_ROWS = auto()
    SCRATCH = auto()
    SCRATCH_BYTES = auto()
    BARRIER = auto()
    THREAD = auto()
    THREADS = auto()
    YIELD = auto()


class LayerWords(_Places):
    """One layer's record."""

    NORM = auto()
    QKV = auto()
    QKV_BIAS = auto()
    QUERY_NORM = auto()
    KEY_NORM = auto()
    OUT = auto()
    OUT_BIAS = auto()
    MLP_NORM = auto()
    GATE_UP = auto()
    DOWN = auto()
    KEYS = auto()
    VALUES = auto()
    TOKEN_STRIDE = auto()
    POOL = auto()


class BatchWords(_Places):
    """Head of a batch's table; ``PoolWords`` records follow."""

    ROWS = auto()
    TOKENS = auto()
    POSITIONS = auto()
    WANTED = auto()
    WANTED_ROWS = auto()
    LOGITS = auto()
    CHOSEN = auto()
    """Where the likeliest token of each wanted row goes; 0: nowhere."""


class PoolWords(_Places):
    """Per pool of the arena, arrays with an entry for each row."""

    SLOTS = auto()
    """Where its keys and values go."""
    LOWS = auto()
    """The first position that it sees."""
    STARTS = auto()
    """The position at which its segments begin."""
    SEGMENTS = auto()
    """Address of its segments: pairs of first slot and count."""
