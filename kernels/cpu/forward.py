"""The whole forward of a Llama-like model as one function that several threads run together.

A step ends where every thread has done its share of it. Each product takes the rows' norm along,
so that a layer is six steps.
"""

from __future__ import annotations

from typing import Any

from outrider.kernels.cpu.attention import write_attend, write_rotate, write_store
from outrider.kernels.cpu.barrier import write_wait
from outrider.kernels.cpu.choose import write_choose
from outrider.kernels.cpu.language import FLOAT, INT, INT8, POINTER, Code, Value, ir
from outrider.kernels.cpu.linear import write_linear
from outrider.kernels.cpu.numbers import load_floats
from outrider.kernels.cpu.shape import KernelShape
from outrider.kernels.cpu.tables import BatchWords, LayerWords, ModelWords, PoolWords
from outrider.kernels.linear_shapes import Epilogue


def write_forward(module: ir.Module, shape: KernelShape, pause: str) -> None:
    """The functions ``together``, which OpenMP calls on every thread, and ``alone``.

    Their argument points at three words: the address of the model's table, that of a list of
    batches' addresses, and their number. They run one after the other; what one has chosen may be
    the tokens of the next.
    """
    body = _write_body(module, shape, pause)
    for name in ("together", "alone"):
        code = Code(module, name, [POINTER], seen=True)
        (call,) = code.arguments
        model, batches = (code.pointer(call, place) for place in (0, 1))
        thread, threads = code.number(0), code.number(1)
        if name == "together":
            thread, threads = (
                code.call_address(code.load(model, place, INT))
                for place in (ModelWords.THREAD, ModelWords.THREADS)
            )
        with code.range(0, code.load(call, 2, INT)) as number:
            code.call(body, model, code.pointer(batches, number), thread, threads)
        code.done()


def _write_body(module: ir.Module, shape: KernelShape, pause: str) -> Any:
    wait = write_wait(module, pause)
    linear = write_linear(module, shape)
    rotate, keep = write_rotate(module, shape), write_store(module, shape)
    attend, choose = write_attend(module, shape), write_choose(module)
    dim = shape.head_dim
    code = Code(module, "body", [POINTER, POINTER, INT, INT])
    model, batch, thread, threads = code.arguments

    def word(place: int) -> Value:
        return code.load(model, place, INT)

    def array(place: int) -> Value:
        return code.pointer(model, place)

    rows = code.load(batch, BatchWords.ROWS, INT)
    size, width = word(ModelWords.HIDDEN), word(ModelWords.HIDDEN_WIDTH)
    heads, kv_heads = word(ModelWords.HEADS), word(ModelWords.KV_HEADS)
    hidden, qkv = array(ModelWords.HIDDEN_ROWS), array(ModelWords.QKV_ROWS)
    mixed, gated = array(ModelWords.MIXED_ROWS), array(ModelWords.GATED_ROWS)
    qkv_width, mixed_width = word(ModelWords.QKV_WIDTH), word(ModelWords.MIXED_WIDTH)
    gated_width = word(ModelWords.GATED_WIDTH)
    eps = code.load(model, ModelWords.EPS * 2, FLOAT)
    scale = code.load(model, ModelWords.SCALE * 2, FLOAT)
    scratch = code.at(array(ModelWords.SCRATCH), thread * word(ModelWords.SCRATCH_BYTES), INT8)
    null = code.null()

    def meet() -> None:
        code.call(wait, array(ModelWords.BARRIER), threads, word(ModelWords.YIELD))

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

    positions = code.pointer(batch, BatchWords.POSITIONS)
    with code.range(*mine(rows)) as row:
        # What was chosen before may have been -1: then nobody looks at the rest.
        token = code.later(code.load(code.pointer(batch, BatchWords.TOKENS), row, INT), 0)
        with code.range(0, size, 8) as k:
            value = load_floats(
                code,
                array(ModelWords.EMBEDDING),
                token * word(ModelWords.HIDDEN) + k,
                shape.weights,
                8,
            )
            code.store(value, hidden, row * width + k)
        # What stood here may not have been finite, and steps add to the padding too.
        with code.range(size, width, 8) as k:
            code.store(code.zeros(8), hidden, row * width + k)
    meet()

    records = code.at(model, len(ModelWords), INT)
    with code.range(0, word(ModelWords.LAYERS)) as number:
        layer = code.at(records, number * len(LayerWords), INT)

        def own(place: int, layer: Value = layer) -> Value:
            return code.pointer(layer, place)

        product(
            hidden, width, rows, own(LayerWords.QKV), size, qkv_width,
            own(LayerWords.NORM), own(LayerWords.QKV_BIAS), qkv, qkv_width, Epilogue.STORE,
        )  # fmt: skip
        pool = code.at(
            batch, code.load(layer, LayerWords.POOL, INT) * len(PoolWords) + len(BatchWords), INT
        )
        stride = code.load(layer, LayerWords.TOKEN_STRIDE, INT)
        every = heads + kv_heads * 2
        with code.range(*mine(rows * every)) as unit:
            row, head = unit // every, unit % every
            place = code.at(qkv, row * qkv_width + head * dim)
            is_key = head.compare(">=", heads)
            with code.when(head.compare("<", heads + kv_heads)):
                position = code.load(positions, row, INT)
                norm = code.choose(is_key, own(LayerWords.KEY_NORM), own(LayerWords.QUERY_NORM))
                cos, sin = (
                    code.at(array(table), position * dim)
                    for table in (ModelWords.COS, ModelWords.SIN)
                )
                code.call(rotate, place, norm, eps, cos, sin)
            with code.when(is_key):
                slot = code.load(code.pointer(pool, PoolWords.SLOTS), row, INT)
                kv = head - heads
                is_value = kv.compare(">=", kv_heads)
                cache = code.choose(is_value, own(LayerWords.VALUES), own(LayerWords.KEYS))
                kv = code.choose(is_value, kv - kv_heads, kv)
                code.call(keep, place, cache, slot * stride + kv * dim)
        meet()
        group = heads // kv_heads
        element = 4 if shape.cache == "float32" else 2
        with code.range(*mine(rows * heads)) as unit:
            row, head = unit // heads, unit % heads
            begin = head // group * (dim * element)
            keys, values = (
                code.at(own(cache), begin, INT8) for cache in (LayerWords.KEYS, LayerWords.VALUES)
            )
            code.call(
                attend,
                code.at(qkv, row * qkv_width + head * dim),
                keys,
                values,
                stride,
                code.pointer(code.pointer(pool, PoolWords.SEGMENTS), row),
                code.load(code.pointer(pool, PoolWords.STARTS), row, INT),
                code.load(code.pointer(pool, PoolWords.LOWS), row, INT),
                code.load(positions, row, INT) + 1,
                scale,
                scratch,
                code.at(mixed, row * mixed_width + head * dim),
            )
        meet()
        product(
            mixed, mixed_width, rows, own(LayerWords.OUT), word(ModelWords.MIXED), width,
            null, own(LayerWords.OUT_BIAS), hidden, width, Epilogue.RESIDUAL,
        )  # fmt: skip
        product(
            hidden, width, rows, own(LayerWords.GATE_UP), size, gated_width * 2,
            own(LayerWords.MLP_NORM), null, gated, gated_width, Epilogue.GATED,
        )  # fmt: skip
        product(
            gated, gated_width, rows, own(LayerWords.DOWN), word(ModelWords.GATED), width,
            null, null, hidden, width, Epilogue.RESIDUAL,
        )  # fmt: skip

    wanted = code.load(batch, BatchWords.WANTED, INT)
    picked = array(ModelWords.PICKED_ROWS)
    with code.range(*mine(wanted)) as row:
        source = code.load(code.pointer(batch, BatchWords.WANTED_ROWS), row, INT)
        with code.range(0, width, 8) as k:
            code.store(code.load(hidden, source * width + k, FLOAT, 8), picked, row * width + k)
    meet()
    vocabulary = word(ModelWords.VOCABULARY_WIDTH)
    product(
        picked, width, wanted, array(ModelWords.HEAD), size, vocabulary,
        array(ModelWords.NORM), null, code.pointer(batch, BatchWords.LOGITS), vocabulary,
        Epilogue.STORE,
    )  # fmt: skip
    chosen = code.pointer(batch, BatchWords.CHOSEN)
    with code.when(chosen.compare("!=", null)):
        with code.range(*mine(wanted)) as row:
            logits = code.at(code.pointer(batch, BatchWords.LOGITS), row * vocabulary)
            code.call(choose, logits, word(ModelWords.VOCABULARY), code.at(chosen, row, INT))
        meet()
    return code.done()
