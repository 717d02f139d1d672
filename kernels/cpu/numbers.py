"""16-bit numbers to float32 and back, and the exponential function."""

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


def exp(code: Code, x: Value) -> Value:
    """e^x of a vector of floats, within 2 units of the last place; Cephes' expf.

    Below -87.3 it stays at e^-87.3, above 88.3 at e^88.3; NaN stays NaN.
    """
    kind = x.kind
    x = code.choose(x.compare("<", -87.3), -87.3, x)
    x = code.choose(x.compare(">", 88.3), 88.3, x)
    steps = code.nearest(x * 1.4426950408889634)
    rest = code.fma(steps, code.number(-0.693359375, kind), x)
    rest = code.fma(steps, code.number(2.12194440e-4, kind), rest)
    value = code.number(1.9875691500e-4, kind)
    for factor in (
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    ):
        value = code.fma(value, rest, code.number(factor, kind))
    value = code.fma(value, rest * rest, rest + 1.0)
    scale = ((code.whole(steps) + 127) << 23).to(kind)
    return value * scale
