"""16-bit numbers to float32 and back."""

from __future__ import annotations

from typing import Any

from outrider.kernels.cpu.language import FLOAT, HALF, INT16, INT32, Code, Value, vector


def load_floats(code: Code, pointer: Value, index: Any, kind: str, lanes: int) -> Value:
    """``lanes`` numbers of type ``kind`` from element ``index`` on, as float32."""
    if kind == "float32":
        return code.load(pointer, index, FLOAT, lanes)
    if kind == "float16":
        half = code.load(pointer, index, HALF, lanes)
        return Value(code, code.builder.fpext(half.raw, vector(FLOAT, lanes)))
    # A bfloat16 is the upper half of a float32.
    short = code.load(pointer, index, INT16, lanes)
    wide = Value(code, code.builder.zext(short.raw, vector(INT32, lanes)))
    return (wide << 16).to(vector(FLOAT, lanes))


def store_floats(code: Code, value: Value, pointer: Value, index: Any, kind: str) -> None:
    """Float32 numbers to type ``kind``, rounded to the nearest, ties to even."""
    lanes = value.kind.count
    if kind == "float32":
        code.store(value, pointer, index, FLOAT)
    elif kind == "float16":
        half = Value(code, code.builder.fptrunc(value.raw, vector(HALF, lanes)))
        code.store(half, pointer, index, HALF)
    else:
        bits = value.to(vector(INT32, lanes))
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # The sum would carry some NaNs over into an infinity.
        real = value.compare("==", value)
        rounded = code.choose(real, rounded, 0x7FC0)
        short = Value(code, code.builder.trunc(rounded.raw, vector(INT16, lanes)))
        code.store(short, pointer, index, INT16)
