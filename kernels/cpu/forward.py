"""The whole forward of a Llama-like model as one function that several threads run together.

A step ends where every thread has done its share of it. Each product takes the rows' norm along,
so that a layer is six steps.
"""

from __future__ import annotations

from typing import Any

from outrider.kernels.cpu.attention import write_attend, write_rotate, write_store
from outrider.kernels.cpu.barrier import write_wait
from outrider.kernels.cpu.language import FLOAT, INT, INT8, POINTER, Code, Value, ir
from outrider.kernels.cpu.linear import Epilogue, write_linear
from outrider.kernels.cpu.numbers import load_floats
from outrider.kernels.cpu.shape import Shape
from outrider.kernels.cpu.tables import Batch, Layer, Model, Pool

def write_forward(module: ir.Module, shape: Shape, pause: str) -> None:
    """The functions ``together``, which OpenMP calls on every thread, and ``alone``.

    Their argument points at two words: the addresses of the model's table and the batch's.
    """
    body = _write_body(module, shape, pause)
    for name in ("together", "alone"):
        code = Code(module, name, [POINTER], seen=True)
        thread, threads = code.number(0), code.number(1)
        if name == "together":
            model = code.pointer(code.arguments[0], 0)
            thread, threads = (
                code.call_address(code.load(model, place, INT))
                for place in (Model.THREAD, Model.THREADS)
            )
        code.call(body, code.arguments[0], thread, threads)
        code.done()


def _write_body(module: ir.Module, shape: Shape, pause: str) -> Any:
    wait = write_wait(module, pause)
    linear = write_linear(module, shape)
    rotate, keep = write_rotate(module, shape), write_store(module, shape)
    attend = write_attend(module, shape)
    dim = shape.head_dim
    code = Code(module, "body", [POINTER, INT, INT])
    tables, thread, threads = code.arguments
    model, batch = (code.pointer(tables, place) for place in (0, 1))

    def word(place: int) -> Value:
        return code.load(model, place, INT)

    def array(place: int) -> Value:
        return code.pointer(model, place)

    rows = code.load(batch, Batch.ROWS, INT)
    width, heads, kv_heads = word(Model.HIDDEN_WIDTH), word(Model.HEADS), word(Model.KV_HEADS)
    hidden, qkv = array(Model.HIDDEN_ROWS), array(Model.QKV_ROWS)
    mixed, gated = array(Model.MIXED_ROWS), array(Model.GATED_ROWS)
    qkv_width, mixed_width = word(Model.QKV_WIDTH), word(Model.MIXED_WIDTH)
    gated_width = word(Model.GATED_WIDTH)
    eps = code.load(model, Model.EPS * 2, FLOAT)
    scale = code.load(model, Model.SCALE * 2, FLOAT)
    scratch = code.at(array(Model.SCRATCH), thread * word(Model.SCRATCH_BYTES), INT8)
    null = code.null()

    def meet() -> None:
        code.call(wait, array(Model.BARRIER), threads, word(Model.YIELD))

    def mine(count: Value) -> tuple[Value, Value]:
        return count * thread // threads, count * (thread + 1) // threads

    def product(
        x: Value, stride: Value, count: Value, w: Value, depth: Value, columns: Value,
        norm: Value, bias: Value, out: Value, out_stride: Value, epilogue: Epilogue,
    ) -> None:  # fmt: skip
        code.call(
            linear, x, stride, count, w, depth, columns, norm, eps, bias, out, out_stride,
            code.number(int(epilogue)), scratch, thread, threads,
        )  # fmt: skip
        meet()

    positions = code.pointer(batch, Batch.POSITIONS)
    with code.range(*mine(rows)) as row:
        token = code.load(code.pointer(batch, Batch.TOKENS), row, INT)
        with code.range(0, word(Model.HIDDEN), 8) as k:
            value = load_floats(
                code, array(Model.EMBEDDING), token * word(Model.HIDDEN) + k, shape.weights, 8
            )
            code.store(value, hidden, row * width + k)
        # What stood here may not have been finite, and steps add to the padding too.
        with code.range(word(Model.HIDDEN), width, 8) as k:
            code.store(code.zeros(8), hidden, row * width + k)
    meet()

    records = code.at(model, len(Model), INT)
    with code.range(0, word(Model.LAYERS)) as number:
        layer = code.at(records, number * len(Layer), INT)

        def own(place: int, layer: Value = layer) -> Value:
            return code.pointer(layer, place)

        product(
            hidden, width, rows, own(Layer.QKV), word(Model.HIDDEN), qkv_width,
            own(Layer.NORM), own(Layer.QKV_BIAS), qkv, qkv_width, Epilogue.STORE,
        )  # fmt: skip
        pool = code.at(batch, code.load(layer, Layer.POOL, INT) * len(Pool) + len(Batch), INT)
        stride = code.load(layer, Layer.TOKEN_STRIDE, INT)
        every = heads + kv_heads * 2
        with code.range(*mine(rows * every)) as unit:
            row, head = unit // every, unit % every
            place = code.at(qkv, row * qkv_width + head * dim)
            is_key = head.compare(">=", heads)
            with code.when(head.compare("<", heads + kv_heads)):
                position = code.load(positions, row, INT)
                norm = code.choose(is_key, own(Layer.KEY_NORM), own(Layer.QUERY_NORM))
                cos, sin = (
                    code.at(array(table), position * dim) for table in (Model.COS, Model.SIN)
                )
                code.call(rotate, place, norm, eps, cos, sin)
            with code.when(is_key):
                slot = code.load(code.pointer(pool, Pool.SLOTS), row, INT)
                kv = head - heads
                is_value = kv.compare(">=", kv_heads)
                cache = code.choose(is_value, own(Layer.VALUES), own(Layer.KEYS))
                kv = code.choose(is_value, kv - kv_heads, kv)
                code.call(keep, place, cache, slot * stride + kv * dim)
        meet()
        group = heads // kv_heads
        size = 4 if shape.cache == "float32" else 2
        with code.range(*mine(rows * heads)) as unit:
            row, head = unit // heads, unit % heads
            begin = head // group * (dim * size)
            keys, values = (
                code.at(own(cache), begin, INT8) for cache in (Layer.KEYS, Layer.VALUES)
            )
            code.call(
                attend,
                code.at(qkv, row * qkv_width + head * dim),
                keys,
                values,
                stride,
                code.pointer(code.pointer(pool, Pool.SEGMENTS), row),
                code.load(code.pointer(pool, Pool.STARTS), row, INT),
                code.load(code.pointer(pool, Pool.LOWS), row, INT),
                code.load(positions, row, INT) + 1,
                scale,
                scratch,
                code.at(mixed, row * mixed_width + head * dim),
            )
        meet()
        product(
            mixed, mixed_width, rows, own(Layer.OUT), word(Model.MIXED), width,
            null, own(Layer.OUT_BIAS), hidden, width, Epilogue.ADD,
        )  # fmt: skip
        product(
            hidden, width, rows, own(Layer.GATE_UP), word(Model.HIDDEN), gated_width * 2,
            own(Layer.MLP_NORM), null, gated, gated_width, Epilogue.GATED,
        )  # fmt: skip
        product(
            gated, gated_width, rows, own(Layer.DOWN), word(Model.GATED), width,
            null, null, hidden, width, Epilogue.ADD,
        )  # fmt: skip

    wanted = code.load(batch, Batch.WANTED, INT)
    picked = array(Model.PICKED_ROWS)
    with code.range(*mine(wanted)) as row:
        source = code.load(code.pointer(batch, Batch.WANTED_ROWS), row, INT)
        with code.range(0, width, 8) as k:
            code.store(code.load(hidden, source * width + k, FLOAT, 8), picked, row * width + k)
    meet()
    vocabulary = word(Model.VOCABULARY_WIDTH)
    product(
        picked, width, wanted, array(Model.HEAD), word(Model.HIDDEN), vocabulary,
        array(Model.NORM), null, code.pointer(batch, Batch.LOGITS), vocabulary, Epilogue.STORE,
    )  # fmt: skip
    return code.done()
