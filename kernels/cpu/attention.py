"""Rotary embedding, the write to the KV arena, and attention of one row over it.

A row reads the positions ``low … high - 1`` of its own sequence, in ascending order, wherever they
lie: the scores, the largest of them, the weights, and the weighted sum of values, one position
after the other. Neither other rows nor the pieces in which the KV lies change a bit.
"""

from __future__ import annotations

from typing import Any

from outrider.kernels.cpu.language import FLOAT, INT, POINTER, Code, Value, ir, vector
from outrider.kernels.cpu.numbers import exp, load_floats, store_floats
from outrider.kernels.cpu.shape import KernelShape


def write_rotate(module: ir.Module, shape: KernelShape) -> Any:
    """The function ``rotate``: one head of one row, in place, with its norm before.

    Arguments: head [dim], its norm's weight [dim] or null, eps, cos [dim], signed sin [dim].
    """
    dim, half = shape.head_dim, shape.head_dim // 2
    code = Code(module, "rotate", [POINTER, POINTER, FLOAT, POINTER, POINTER])
    head, norm, eps, cos, sin = code.arguments
    with code.when(norm.compare("!=", code.null())):
        value = code.load(head, 0, FLOAT, dim)
        mean = code.total(value * value) / float(dim)
        scale = code.number(1.0, FLOAT) / code.sqrt(mean + eps)
        code.store(value * scale * code.load(norm, 0, FLOAT, dim), head, 0)
    low, high = (code.load(head, begin, FLOAT, half) for begin in (0, half))
    for own, other, begin in ((low, high, 0), (high, low, half)):
        turned = own * code.load(cos, begin, FLOAT, half)
        turned = code.fma(other, code.load(sin, begin, FLOAT, half), turned)
        code.store(turned, head, begin)
    return code.done()


def write_store(module: ir.Module, shape: KernelShape) -> Any:
    """The function ``keep``: one head of floats to its place in the arena, in the arena's type."""
    code = Code(module, "keep", [POINTER, POINTER, INT])
    head, cache, index = code.arguments
    value = code.load(head, 0, FLOAT, shape.head_dim)
    store_floats(code, value, cache, index, shape.cache)
    return code.done()


def write_attend(module: ir.Module, shape: KernelShape) -> Any:
    """The function ``attend``: one query head of one row.

    Arguments: query [dim], keys and values (the layer's, at the KV head), elements between two
    tokens, segments (pairs of first slot and count, by ascending position), the position of the
    first, low, high, scale, scores (scratch, ``high - low`` rounded up to 16), out [dim].
    """
    dim = shape.head_dim
    kinds = [POINTER, POINTER, POINTER, INT, POINTER, INT, INT, INT, FLOAT, POINTER, POINTER]
    code = Code(module, "attend", kinds)
    query, keys, values, stride, segments, start, low, high, scale, scores, out = code.arguments

    def each_piece(body: Any) -> None:
        """Calls ``body(position, slot)`` in a loop over positions, piece by piece."""
        position = code.variable(start)
        number = code.variable(code.number(0))
        with code.loop(lambda: position.get().compare("<", high)):
            slot = code.load(segments, number.get() * 2, INT)
            count = code.load(segments, number.get() * 2 + 1, INT)
            first = position.get()
            end = first + count
            with code.range(code.later(low, first), code.smaller(high, end)) as place:
                body(place, slot + place - first)
            position.set(end)
            number.set(number.get() + 1)

    wanted = code.load(query, 0, FLOAT, dim)

    def score(place: Value, slot: Value) -> None:
        key = load_floats(code, keys, slot * stride, shape.cache, dim)
        code.store(code.total(wanted * key) * scale, scores, place - low)

    each_piece(score)
    lanes = 16
    count = high - low
    # What is behind the last score up to whole vectors must not be the largest, nor weigh.
    lowest = code.number(float("-inf"), vector(FLOAT, lanes))
    tail = count // lanes * lanes
    with code.range(count, tail + lanes) as place:
        code.store(code.number(float("-inf"), FLOAT), scores, place)
    top = code.variable(lowest)
    with code.range(0, count, lanes) as place:
        top.set(code.largest(top.get(), code.load(scores, place, FLOAT, lanes)))
    peak = code.highest_lane(top.get())
    sums = code.variable(code.zeros(lanes))
    with code.range(0, count, lanes) as place:
        one = code.load(scores, place, FLOAT, lanes)
        weight = exp(code, one - peak)
        weight = code.choose(one.compare("==", lowest), 0.0, weight)
        sums.set(sums.get() + weight)
        code.store(weight, scores, place)
    total = code.variable(code.zeros(dim))

    def blend(place: Value, slot: Value) -> None:
        value = load_floats(code, values, slot * stride, shape.cache, dim)
        weight = code.repeat(code.load(scores, place - low, FLOAT), dim)
        total.set(code.fma(weight, value, total.get()))

    each_piece(blend)
    code.store(total.get() / code.total(sums.get()), out, 0)
    return code.done()
