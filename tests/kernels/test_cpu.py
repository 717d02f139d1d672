"""The CPU kernels one by one, compiled for this processor, against float64 and torch."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("llvmlite")

from outrider.kernels.cpu import attention, choose, compile, linear, numbers
from outrider.kernels.cpu.language import FLOAT, INT, POINTER, Code, ir
from outrider.kernels.cpu.numbers import exp
from outrider.kernels.cpu.shape import KernelShape, columns_for, padded
from outrider.kernels.linear_shapes import Epilogue
from outrider.shared.model.cpu.weights import gated_panels, panels

WORD = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
COLUMNS = columns_for(compile.vector_lanes())


def built(write: Callable[[ir.Module], Any], *kinds: Any) -> Any:
    """One function of a module, callable."""
    module = ir.Module("test")
    function = write(module)
    function.linkage = ""
    engine = compile.loaded(compile.optimised(str(module)))
    call = ctypes.CFUNCTYPE(None, *kinds)(engine.get_function_address(function.name))
    call.engine = engine
    return call


P, N, F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
LINEAR = (P, N, N, P, N, N, P, F, P, P, N, N, P, N, N)


def linear_of(
    x: Tensor,
    packed: Tensor,
    outputs: int,
    *,
    norm: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    epilogue: Epilogue = Epilogue.STORE,
    columns: int = COLUMNS,
    threads: int = 1,
    depth: int | None = None,
) -> Tensor:
    """``outputs``: with its padding."""
    shape = KernelShape(WORD[packed.dtype], "float32", 8, columns)
    call = BUILT.setdefault(shape, None) or built(
        lambda module: linear.write_linear(module, shape), *LINEAR
    )
    BUILT[shape] = call
    rows, stride = x.shape
    width = packed.shape[0] * columns
    if out is None:
        out = torch.full((rows, outputs), float("nan"))
    scratch = torch.full((linear.scratch_floats(shape, max(stride, 64)),), float("nan"))
    for thread in range(threads):
        call(
            x.data_ptr(), stride, rows, packed.data_ptr(), depth or stride, width,
            norm.data_ptr() if norm is not None else None, 1e-5,
            bias.data_ptr() if bias is not None else None,
            out.data_ptr(), out.shape[1], int(epilogue), scratch.data_ptr(), thread, threads,
        )  # fmt: skip
    return out


BUILT: dict[KernelShape, Any] = {}


def near(found: Tensor, right: Tensor, terms: int) -> None:
    """Within what a chain of ``terms`` float32 additions may lose."""
    assert (found - right).abs().max() < terms**0.5 * 2e-7 * (1 + right.abs().max())


@pytest.mark.parametrize("dtype", WORD)
@pytest.mark.parametrize("rows", [1, 5, 6, 7, 18, 100])
def test_linear_is_the_product(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    x, w = torch.randn(rows, 48), torch.randn(3 * COLUMNS - 5, 48).to(dtype)
    bias = torch.randn(3 * COLUMNS)
    found = linear_of(x, panels(w, COLUMNS, dtype), 3 * COLUMNS, bias=bias)
    right = x.double() @ w.double().T + bias[: w.shape[0]].double()
    near(found[:, : w.shape[0]], right, 48)
    assert torch.equal(found[:, w.shape[0] :], bias[w.shape[0] :].expand(rows, -1))


@pytest.mark.parametrize("dtype", WORD)
def test_linear_row_has_the_same_bits_however_it_is_asked_for(dtype: torch.dtype) -> None:
    """Against the chain of multiply-adds over ascending k, which says what the bits are."""
    torch.manual_seed(0)
    x, w = torch.randn(100, 64), torch.randn(128, 64).to(dtype)
    right = torch.zeros(100, 128, dtype=torch.float64)
    for k in range(64):
        # Of two float32 the product is exact in float64, and the sum is rounded twice only
        # where it lies in the middle of two float32 to 29 bits: not here.
        product = x[:, k : k + 1].double() * w[:, k].double()
        right = (right + product).float().double()
    for columns in (16, 32, 64):
        packed = panels(w, columns, dtype)
        for rows in (1, 2, 3, 6, 17, 19, 100):
            found = linear_of(x[:rows].contiguous(), packed, 128, columns=columns, threads=3)
            assert torch.equal(found.double(), right[:rows])


def test_linear_epilogues_add_and_gate() -> None:
    torch.manual_seed(1)
    x, out = torch.randn(4, 32), torch.randn(4, COLUMNS)
    w = torch.randn(COLUMNS, 32)
    before = out.double()
    linear_of(x, panels(w, COLUMNS, w.dtype), COLUMNS, out=out, epilogue=Epilogue.RESIDUAL)
    near(out, before + x.double() @ w.double().T, 32)

    inner = COLUMNS // 2 + 3
    gate, up = torch.randn(inner, 32), torch.randn(inner, 32)
    packed = gated_panels(gate, up, COLUMNS, torch.bfloat16)
    width = padded(inner, COLUMNS // 2)
    found = linear_of(x, packed, width, epilogue=Epilogue.GATED)
    gate, up = gate.bfloat16().double(), up.bfloat16().double()
    right = torch.nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)
    near(found[:, :inner], right, 32)
    assert not found[:, inner:].any()


@pytest.mark.parametrize("rows", [1, 30])
def test_linear_normalises_first(rows: int) -> None:
    torch.manual_seed(2)
    size, stride = 40, 48
    x, weight = torch.zeros(rows, stride), torch.zeros(stride)
    x[:, :size], weight[:size] = torch.randn(rows, size), torch.rand(size)
    w = torch.randn(COLUMNS, size)
    kept = x.clone()
    found = linear_of(x, panels(w, COLUMNS, w.dtype), COLUMNS, norm=weight, depth=size)
    normed = torch.nn.functional.rms_norm(
        x[:, :size].double(), (size,), weight[:size].double(), eps=1e-5
    )
    near(found, normed @ w.double().T, size)
    assert torch.equal(x, kept)


def test_exp_is_right_to_two_units() -> None:
    def write(module: ir.Module) -> Any:
        code = Code(module, "each", [POINTER, INT])
        data, count = code.arguments
        with code.range(0, count, 16) as place:
            code.store(exp(code, code.load(data, place, FLOAT, 16)), data, place)
        return code.done()

    x = torch.cat([torch.linspace(-87.3, 88.2, 100_000), torch.linspace(-1e-3, 1e-3, 16_000)])
    right = x.double().exp()
    found = x.clone()
    call = built(write, P, N)
    call(found.data_ptr(), len(x) // 16 * 16)
    assert ((found.double() - right).abs() / right).max() < 2 * 2.0**-24 * 1.01
    edges = torch.tensor([float("-inf"), -1e4, 1e4, float("inf"), float("nan"), 0.0] + [0.0] * 10)
    call(edges.data_ptr(), 16)
    assert 0 < edges[0] < 2e-38 and torch.equal(edges[0], edges[1])
    assert edges[2].isfinite() and torch.equal(edges[2], edges[3])
    assert edges[4].isnan() and edges[5] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_round_as_torch_does(dtype: torch.dtype) -> None:
    def write(module: ir.Module) -> Any:
        code = Code(module, "each", [POINTER, POINTER, INT])
        source, to, count = code.arguments
        with code.range(0, count, 16) as place:
            numbers.store_floats(code, code.load(source, place, FLOAT, 16), to, place, WORD[dtype])
        with code.range(0, count, 16) as place:
            value = numbers.load_floats(code, to, place, WORD[dtype], 16)
            code.store(value, source, place)
        return code.done()

    bits = torch.randint(-(2**31), 2**31 - 1, (1 << 18,), dtype=torch.int32)
    ties = torch.arange(0, 1 << 18, dtype=torch.int32) << 12
    x = torch.cat([bits, ties]).view(torch.float32)
    right = x.to(dtype)
    found, back = torch.empty(len(x), dtype=dtype), x.clone()
    built(write, P, P, N)(back.data_ptr(), found.data_ptr(), len(x))
    assert torch.equal(found.isnan(), x.isnan())
    real = ~x.isnan()
    assert torch.equal(found[real], right[real])
    assert torch.equal(back[real], right[real].float())


@pytest.mark.parametrize("dtype", WORD)
@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 16), (3, 40), (17, 33)])
def test_attend_is_attention_wherever_the_kv_lies(low: int, high: int, dtype: torch.dtype) -> None:
    dim, slots = 24, 60
    torch.manual_seed(high)
    shape = KernelShape("float32", WORD[dtype], dim, COLUMNS)
    call = built(
        lambda module: attention.write_attend(module, shape), P, P, P, N, P, N, N, N, F, P, P
    )
    keys, values = (torch.randn(slots, 2, dim).to(dtype) for _ in range(2))
    query, out = torch.randn(dim), torch.empty(dim)

    def run(keys: Tensor, values: Tensor, pieces: list[tuple[int, int]]) -> Tensor:
        segments = torch.tensor(pieces, dtype=torch.int64)
        scores = torch.full((padded(high, 16) + 32,), float("nan"))
        size = dtype.itemsize
        call(
            query.data_ptr(), keys.data_ptr() + dim * size, values.data_ptr() + dim * size,
            2 * dim, segments.data_ptr(), 0, low, high, dim**-0.5, scores.data_ptr(),
            out.data_ptr(),
        )  # fmt: skip
        return out.clone()

    found = run(keys, values, [(0, high)])
    seen = slice(low, high)
    weights = (keys[seen, 1].double() @ query.double() * dim**-0.5).softmax(0)
    near(found, weights @ values[seen, 1].double(), high)
    # The same positions in three pieces, elsewhere.
    cuts = sorted({0, high // 3, 2 * high // 3, high})
    moved_keys, moved_values = torch.full_like(keys, 9), torch.full_like(values, 9)
    pieces, at = [], slots
    for begin, end in itertools.pairwise(cuts):
        at -= end - begin
        moved_keys[at : at + end - begin] = keys[begin:end]
        moved_values[at : at + end - begin] = values[begin:end]
        pieces.append((at, end - begin))
    assert torch.equal(run(moved_keys, moved_values, pieces), found)


def test_kernels_leave_the_order_of_sums_alone() -> None:
    """No flag in the text allows the compiler to change it."""
    text = compile.write(KernelShape("bfloat16", "bfloat16", 64, COLUMNS))
    words = {"fast", "reassoc", "contract", "afn", "arcp", "nsz", "nnan", "ninf"}
    for line in text.splitlines():
        if any(f" {op} " in line for op in ("fadd", "fmul", "fsub", "fdiv", "call", "fcmp")):
            assert not words & set(line.split())


def test_compiled_code_is_kept_and_never_run_when_broken(tmp_path: Path) -> None:
    shape = KernelShape("float32", "float32", 8, 16)
    compile.CompiledForward(shape, tmp_path)
    (kept,) = tmp_path.iterdir()
    whole = kept.read_bytes()
    began = kept.stat().st_mtime_ns
    compile.CompiledForward(shape, tmp_path)
    assert kept.stat().st_mtime_ns == began
    for broken in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b"", whole[:10]):
        kept.write_bytes(broken)
        compile.CompiledForward(shape, tmp_path)
        assert kept.read_bytes() == whole


def test_choose_takes_the_lowest_of_the_largest_and_tells_what_is_not_finite() -> None:
    call = built(choose.write_choose, P, N, P)
    nan, inf = float("nan"), float("inf")

    def chosen(values: Tensor) -> int:
        # What follows the row up to whole vectors must not be looked at.
        row = torch.full((padded(len(values), 16),), inf)
        row[: len(values)] = values
        found = torch.empty(1, dtype=torch.int64)
        call(row.data_ptr(), len(values), found.data_ptr())
        return int(found)

    torch.manual_seed(0)
    for size in (1, 7, 16, 17, 97, 1000):
        for _ in range(20):
            values = torch.randn(size)
            assert chosen(values) == values.argmax()
            assert chosen(values.round()) == int(
                (values.round() == values.round().max()).nonzero()[0]
            )
        masked = torch.full((size,), -inf)
        assert chosen(masked) == -1
        masked[size // 2] = -3.0
        assert chosen(masked) == size // 2
        for wrong in (nan, inf):
            values[size - 1] = wrong
            assert chosen(values) == -1
    assert chosen(torch.zeros(40)) == 0
