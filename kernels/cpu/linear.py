"""Linear layers of any number of rows, whose results do not depend on that number.

``out = epilogue(norm(x) wᵀ + bias)``. A weight matrix lies in *panels* of ``columns`` outputs:
``[panel, k, column]``, read from front to back once for every six rows. Each output is one chain
of fused multiply-adds over ascending k, in a lane of its own, whatever happens beside it: so a
row's bits are the same alone, among others, in one piece or in chunks, with any number of threads
and any width of panel.

In panels of bfloat16 a 32-bit word holds column j in its lower half and column j + columns/2 in
its upper, so that one operation each makes float32 of them.
"""

from __future__ import annotations

from typing import Any

from outrider.kernels.cpu.language import (
    FLOAT,
    INT,
    INT8,
    INT32,
    POINTER,
    Code,
    Value,
    ir,
    vector,
)
from outrider.kernels.cpu.numbers import exp, load_floats
from outrider.kernels.cpu.shape import KernelShape
from outrider.kernels.linear_shapes import Epilogue

AHEAD = 4096
"""Bytes that a panel is asked for in advance: the sums of several rows would wait for it."""

_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}

BLOCK = 96
"""Rows that are taken together: normalised once, and multiplied with a panel while it is near."""


def scratch_floats(shape: KernelShape, longest: int) -> int:
    """Scratch of one thread, for rows and depths of at most ``longest``."""
    return (BLOCK + shape.columns) * longest + shape.rows * shape.columns


def _weights(code: Code, panel: Value, k: Value, kind: str, columns: int) -> Value:
    """Row k of a panel as float32."""
    if kind != "bfloat16":
        return load_floats(code, panel, k * columns, kind, columns)
    half = columns // 2
    words = code.load(panel, k * half, INT32, half)
    low, high = ((part).to(vector(FLOAT, half)) for part in (words << 16, words & -0x10000))
    return code.side_by_side(low, high)


def _tile(module: ir.Module, shape: KernelShape, rows: int, kind: str) -> Any:
    """``rows`` rows times one panel: ``sums[row, column]``."""
    code = Code(module, f"tile_{kind}_{rows}", [POINTER, INT, POINTER, INT, POINTER])
    x, stride, panel, depth, sums = code.arguments
    columns = shape.columns
    totals = [code.variable(code.zeros(columns)) for _ in range(rows)]
    step = columns * _SIZE[kind]
    with code.range(0, depth) as k:
        for line in range(0, step, 64):
            code.prefetch(code.at(panel, k * step + (AHEAD + line), INT8))
        weights = _weights(code, panel, k, kind, columns)
        for row, total in enumerate(totals):
            value = code.load(x, stride * row + k, FLOAT)
            total.set(code.fma(code.repeat(value, columns), weights, total.get()))
    for row, total in enumerate(totals):
        code.store(total.get(), sums, row * columns)
    return code.done()


def _expand(module: ir.Module, shape: KernelShape) -> Any:
    """A panel as float32, for many rows: converted once instead of for every six."""
    code = Code(module, "expand", [POINTER, INT, POINTER])
    panel, depth, out = code.arguments
    with code.range(0, depth) as k:
        weights = _weights(code, panel, k, shape.weights, shape.columns)
        code.store(weights, out, k * shape.columns)
    return code.done()


def _normalise(module: ir.Module) -> Any:
    """RMS norm of one row: ``out = x / sqrt(mean(x²) + eps) * weight``.

    Padding behind the row is zero in ``x`` and in ``weight``.
    """
    code = Code(module, "normalise", [POINTER, INT, INT, POINTER, FLOAT, POINTER])
    x, size, padded_size, weight, eps, out = code.arguments
    squares = code.variable(code.zeros(16))
    with code.range(0, padded_size, 16) as k:
        part = code.load(x, k, FLOAT, 16)
        squares.set(code.fma(part, part, squares.get()))
    mean = code.total(squares.get()) / code.to_float(size)
    scale = code.number(1.0, FLOAT) / code.sqrt(mean + eps)
    with code.range(0, padded_size, 16) as k:
        part = code.load(x, k, FLOAT, 16) * scale * code.load(weight, k, FLOAT, 16)
        code.store(part, out, k)
    return code.done()


def _finish(module: ir.Module, shape: KernelShape) -> Any:
    """One row of sums to its place in ``out``; ``column`` is the panel's first.

    A panel of ``GATED`` holds as many gates as ups; the residual is what stands in ``out``.
    """
    columns, half = shape.columns, shape.columns // 2
    code = Code(module, "finish", [POINTER, POINTER, POINTER, INT, INT])
    sums, out, bias, column, epilogue = code.arguments
    with code.either(epilogue.compare("==", int(Epilogue.GATED))) as (gated, plain):
        with gated:
            gate, up = (code.load(sums, begin, FLOAT, half) for begin in (0, half))
            value = gate / (exp(code, gate * -1.0) + 1.0) * up
            code.store(value, out, column // 2)
        with plain:
            total = code.variable(code.load(sums, 0, FLOAT, columns))
            with code.when(bias.compare("!=", code.null())):
                total.set(total.get() + code.load(bias, column, FLOAT, columns))
            with code.when(epilogue.compare("==", int(Epilogue.RESIDUAL))):
                total.set(code.load(out, column, FLOAT, columns) + total.get())
            code.store(total.get(), out, column)
    return code.done()


def write_linear(module: ir.Module, shape: KernelShape) -> Any:
    """The function ``linear``; this thread does panels ``panels * thread / threads`` and on.

    Arguments: x, its row stride, rows, w, k, columns (whole panels), norm or null, eps, bias or
    null, out, its row stride, epilogue, scratch (``scratch_floats``), thread, threads.
    """
    tiles = [_tile(module, shape, rows, shape.weights) for rows in range(1, shape.rows + 1)]
    wide = tiles[-1]
    if shape.weights != "float32":
        wide = _tile(module, shape, shape.rows, "float32")
        expand = _expand(module, shape)
    normalise, finish = _normalise(module), _finish(module, shape)
    kinds = [POINTER, INT, INT, POINTER, INT, INT, POINTER, FLOAT, POINTER, POINTER, INT, INT]
    code = Code(module, "linear", [*kinds, POINTER, INT, INT])
    x, stride, rows, w, depth, width, norm, eps, bias = code.arguments[:9]
    out, out_stride, epilogue, scratch, thread, threads = code.arguments[9:]
    columns = shape.columns
    size = _SIZE[shape.weights]
    panels = width // columns
    first, last = panels * thread // threads, panels * (thread + 1) // threads
    floats = code.at(scratch, stride * BLOCK)
    sums = code.at(floats, depth * columns)
    with code.when(first.compare("<", last)), code.range(0, rows, BLOCK) as begin:
        count = code.smaller(rows - begin, BLOCK)
        block = code.variable(code.at(x, begin * stride))
        with code.when(norm.compare("!=", code.null())):
            with code.range(0, count) as row:
                one, to = (code.at(place, row * stride) for place in (block.get(), scratch))
                code.call(normalise, one, depth, stride, norm, eps, to)
            block.set(scratch)
        many = count.compare(">=", 3 * shape.rows)
        with code.range(first, last) as panel:
            weights = code.at(w, panel * depth * (columns * size), INT8)
            expanded = code.variable(weights)
            if shape.weights != "float32":
                with code.when(many):
                    code.call(expand, weights, depth, floats)
                    expanded.set(floats)
            with code.range(0, count, shape.rows) as row:
                some = code.smaller(count - row, shape.rows)
                place = code.at(block.get(), row * stride)
                with code.either(many & some.compare("==", shape.rows)) as (whole, rest):
                    with whole:
                        code.call(wide, place, stride, expanded.get(), depth, sums)
                    with rest:
                        code.call_one(tiles, some - 1, [place, stride, weights, depth, sums])
                with code.range(0, some) as one:
                    code.call(
                        finish,
                        code.at(sums, one * columns),
                        code.at(out, (begin + row + one) * out_stride),
                        bias,
                        panel * columns,
                        epilogue,
                    )
    return code.done()
