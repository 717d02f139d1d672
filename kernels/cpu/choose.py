"""The likeliest token of a row: the argmax, the lowest id on ties, -1 where it is not finite."""

from __future__ import annotations

from typing import Any

from outrider.kernels.cpu.language import FLOAT, INT, INT32, POINTER, Code, ir, vector

_LANES = 16


def write_choose(module: ir.Module) -> Any:
    """The function ``choose``: logits (readable up to whole vectors), their count, where to."""
    code = Code(module, "choose", [POINTER, INT, POINTER])
    logits, count, chosen = code.arguments
    whole = vector(INT32, _LANES)
    lanes = code.numbers(range(_LANES), whole)
    best = code.variable(code.number(float("-inf"), vector(FLOAT, _LANES)))
    found = code.variable(code.number(0, whole))
    # Becomes NaN with the first NaN, and stays so.
    spoilt = code.variable(code.zeros(_LANES))
    with code.range(0, count, _LANES) as place:
        ids = lanes + code.narrow(place)
        inside = ids.compare("<", code.narrow(count))
        value = code.choose(inside, code.load(logits, place, FLOAT, _LANES), float("-inf"))
        wrong = value.compare("==", value)
        spoilt.set(code.choose(wrong, spoilt.get(), float("nan")))
        more = value.compare(">", best.get())
        best.set(code.choose(more, value, best.get()))
        found.set(code.choose(more, ids, found.get()))
    top = code.highest_lane(best.get())
    # Among the lanes that hold the largest, the lowest id.
    last = code.number(2**31 - 1, whole)
    ids = code.choose(best.get().compare("==", top), found.get(), last)
    token = code.widened(code.lowest_lane(ids))
    # 0 times an infinity, and whatever is added to NaN, equals nothing.
    sound = (top * 0.0 + code.total(spoilt.get())).compare("==", 0.0)
    code.store(code.choose(sound, token, -1), chosen, 0, INT)
    return code.done()
