"""The kernel for many rows, bit for bit, against a model of the order of its sums."""

from __future__ import annotations

import shutil
from functools import reduce
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from outrider.kernels import linear
from outrider.kernels.linear_many import BLOCK_TILES, BlockTile, ManyLinear, best_tile, depth_of
from outrider.kernels.linear_shapes import Epilogue, Tile, shared_limit
from outrider.kernels.linear_wgmma import WgmmaLinear, WgmmaTile
from outrider.kernels.operation import Tools

CPU = torch.device("cpu")
SMALL = BlockTile(64, 64)
CHIPS = [
    (75, torch.float16),
    (80, torch.float16),
    (80, torch.bfloat16),
    (90, torch.float16),
    (90, torch.bfloat16),
]
CONSECUTIVE = [list(range(first, first + 16)) for first in range(0, 64, 16)]
EIGHTS = [
    [half + piece + part + k for piece in range(0, 32, 8) for k in (0, 1)]
    for half in (0, 32)
    for part in range(0, 8, 2)
]
PIECES = [first + second for first, second in zip(EIGHTS[::2], EIGHTS[1::2], strict=True)]
STEPS = {75: EIGHTS, 80: PIECES, 90: CONSECUTIVE}


def numbers(*size: int, dtype: torch.dtype) -> Tensor:
    """Random, multiples of 2^-14: float64 adds their products without rounding."""
    return (torch.randn(size).to(dtype).double() * 2**14).round().div(2**14).to(dtype)


def chain(slices: list[Tensor]) -> Tensor:
    return reduce(torch.add, slices, torch.zeros_like(slices[0]))


def tree(slices: list[Tensor]) -> Tensor:
    a, b, c, d = (slices[i] + slices[i + 4] for i in range(4))
    return (a + b) + (c + d)


def sums(x: Tensor, w: Tensor, steps: list[list[int]], add=chain) -> Tensor:
    """x wᵀ: float32 slices of steps that are rounded once each, then the slices added."""
    chunks = x.shape[1] // 64
    bounds = [s * chunks // 8 for s in range(9)]
    slices = []
    for begin, end in pairwise(bounds):
        total = torch.zeros(x.shape[0], w.shape[0])
        for chunk in range(begin, end):
            for step in steps:
                k = [64 * chunk + i for i in step]
                total = (total.double() + x[:, k].double() @ w[:, k].double().T).float()
        slices.append(total)
    return add(slices)


def finished(y: Tensor, dtype: torch.dtype, epilogue: Epilogue, bias, residual) -> Tensor:
    if bias is not None:
        y = y + bias.float()
    if epilogue == Epilogue.STORE_FLOAT:
        return y
    rounded = y.to(dtype).float()
    if epilogue == Epilogue.GATED:
        gate, up = rounded.chunk(2, dim=-1)
        weight = 1 + gate.double().neg().exp().float()
        return ((gate / weight).to(dtype).float() * up).to(dtype)
    if epilogue == Epilogue.RESIDUAL:
        return (residual.float() + rounded).to(dtype)
    return rounded.to(dtype)


def run(compiler, x: Tensor, w: Tensor, *, tile: BlockTile | None = SMALL, **more) -> Tensor:
    """What the kernel writes; nothing behind its rows is touched."""
    epilogue = more.get("epilogue", Epilogue.STORE_FLOAT)
    columns = w.shape[0] // 2 if epilogue == Epilogue.GATED else w.shape[0]
    kind = torch.float32 if epilogue == Epilogue.STORE_FLOAT else x.dtype
    out = torch.full((x.shape[0] + 3, columns), float("nan"), dtype=kind)
    call = ManyLinear(Tools(CPU, compiler))
    call(x=x, w=w, out=out, rows=x.shape[0], tile=tile, **{"epilogue": epilogue, **more})
    assert out[x.shape[0] :].isnan().all()
    return out[: x.shape[0]]


@pytest.mark.parametrize(("arch", "dtype"), CHIPS, ids=str)
def test_sums_are_in_the_order_that_is_written_down(emulated, arch, dtype):
    torch.manual_seed(1)
    compiler = emulated(arch)
    # Chunks that are eight times something, that are not, and fewer than the slices.
    for rows, columns, k in ((70, 72, 11 * 64), (5, 70, 16 * 64), (130, 200, 3 * 64), (1, 16, 64)):
        x, w = numbers(rows, k, dtype=dtype), numbers(columns, k, dtype=dtype)
        want = sums(x, w, STEPS[arch])
        for late in (0, 1):
            compiler.late = late
            assert torch.equal(run(compiler, x, w), want), (rows, columns, k, late)


@pytest.mark.parametrize("arch", STEPS)
def test_another_order_gives_other_bits(emulated, arch):
    """What the test above would find."""
    torch.manual_seed(2)
    x, w = numbers(64, 1024, dtype=torch.float16), numbers(64, 1024, dtype=torch.float16)
    have = run(emulated(arch), x, w)
    assert torch.equal(have, sums(x, w, STEPS[arch]))
    assert not torch.equal(have, sums(x, w, STEPS[arch], tree))
    for other in STEPS.keys() - {arch}:
        assert not torch.equal(have, sums(x, w, STEPS[other]))
    assert not torch.equal(have, sums(x, w, STEPS[arch][::-1]))


@pytest.mark.parametrize("epilogue", Epilogue)
@pytest.mark.parametrize(
    ("arch", "dtype"), [(75, torch.float16), (90, torch.bfloat16)], ids=["sm_75", "sm_90"]
)
def test_every_epilogue_rounds_where_separate_layers_would(emulated, arch, dtype, epilogue):
    torch.manual_seed(3)
    for rows, columns, with_bias in ((67, 80, True), (2, 144, False), (65, 71, True)):
        if epilogue == Epilogue.GATED and columns % 16:
            continue
        x, w = numbers(rows, 320, dtype=dtype), numbers(columns, 320, dtype=dtype) / 16
        bias = numbers(columns, dtype=dtype) if with_bias else None
        residual = numbers(rows, columns, dtype=dtype) if epilogue == Epilogue.RESIDUAL else None
        want = finished(sums(x, w, STEPS[arch]), dtype, epilogue, bias, residual)
        have = run(emulated(arch), x, w, epilogue=epilogue, bias=bias, residual=residual)
        assert torch.equal(have, want), (rows, columns)


@pytest.mark.parametrize("arch", STEPS)
def test_tile_changes_no_bit(emulated, arch):
    torch.manual_seed(4)
    dtype = torch.float16
    x, w = numbers(150, 192, dtype=dtype), numbers(288, 192, dtype=dtype) / 16
    outs = [run(emulated(arch), x, w, tile=s, epilogue=Epilogue.GATED) for s in BLOCK_TILES]
    assert all(torch.equal(outs[0], out) for out in outs)


def test_tiles_of_many_rows_are_each_done_once(emulated):
    torch.manual_seed(5)
    x, w = numbers(64 * 9 + 1, 64, dtype=torch.float16), numbers(130, 64, dtype=torch.float16)
    assert torch.equal(run(emulated(90), x, w), sums(x, w, CONSECUTIVE))


def test_residual_may_be_where_the_output_goes(emulated):
    torch.manual_seed(6)
    dtype = torch.bfloat16
    x, w = numbers(20, 128, dtype=dtype), numbers(64, 128, dtype=dtype)
    out = numbers(20, 64, dtype=dtype)
    want = finished(sums(x, w, CONSECUTIVE), dtype, Epilogue.RESIDUAL, None, out)
    call = ManyLinear(Tools(CPU, emulated(90)))
    call(x=x, w=w, out=out, rows=20, epilogue=Epilogue.RESIDUAL, residual=out, tile=SMALL)
    assert torch.equal(out, want)


@pytest.mark.parametrize("arch", STEPS)
def test_a_row_has_the_same_bits_from_every_kernel(emulated, arch):
    torch.manual_seed(8)
    tools = Tools(CPU, emulated(arch))
    few = linear.OPERATION.implementations[0].build(tools)
    x, w = numbers(64, 704, dtype=torch.float16), numbers(72, 704, dtype=torch.float16)
    have = run(tools.compiler, x, w)
    for rows in (1, 12, 64):
        out = torch.empty(rows, 72)
        few(x=x, w=w, out=out, rows=rows, epilogue=Epilogue.STORE_FLOAT)
        assert torch.equal(out, have[:rows])
    have = run(tools.compiler, x, w[:64], epilogue=Epilogue.GATED)
    for rows, tile in ((64, Tile(4, 3)), (5, Tile(5, 3))):
        out = torch.zeros(rows, 32, dtype=x.dtype)
        few(x=x, w=w[:64], out=out, rows=rows, epilogue=Epilogue.GATED, tile=tile)
        assert torch.equal(out, have[:rows])
    if arch == 90:
        have = run(tools.compiler, x, w)
        out = torch.empty_like(have)
        WgmmaLinear(tools)(x=x, w=w, out=out, rows=64, epilogue=Epilogue.STORE_FLOAT)
        assert torch.equal(out, have)


WGMMA_TILES = [WgmmaTile(2, 6), WgmmaTile(1, 3), WgmmaTile(1, 4, split=4), WgmmaTile(1, 3, split=8)]


@pytest.mark.parametrize("tile", WGMMA_TILES, ids=str)
@pytest.mark.parametrize("epilogue", Epilogue)
def test_hopper_tile_changes_no_bit(emulated, epilogue, tile):
    """Several tiles a block, with fewer chunks of k than slices, as many, and more."""
    torch.manual_seed(9)
    compiler = emulated(90)
    # Copies that land at once and late: both for every tile, and both for every epilogue.
    compiler.late = (WGMMA_TILES.index(tile) + epilogue) % 2
    dtype = torch.bfloat16
    for rows, columns, k in ((300, 144, 192), (130, 272, 1216), (70, 80, 1984)):
        x, w = numbers(rows, k, dtype=dtype), numbers(columns, k, dtype=dtype) / 16
        bias = numbers(columns, dtype=dtype)
        residual = numbers(rows, columns, dtype=dtype) if epilogue == Epilogue.RESIDUAL else None
        want = finished(sums(x, w, CONSECUTIVE), dtype, epilogue, bias, residual)
        out = torch.full((rows + 3, want.shape[1]), float("nan"), dtype=want.dtype)
        WgmmaLinear(Tools(CPU, compiler))(
            x=x, w=w, out=out, rows=rows, epilogue=epilogue, bias=bias, residual=residual, tile=tile
        )
        assert torch.equal(out[:rows], want), (rows, columns, k)
        assert out[rows:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_quotient_of_every_gate_has_the_bits_of_division(emulated, tmp_path, dtype):
    compiler = emulated(90)
    for header in ("prelude.cuh", "linear.cuh"):
        shutil.copy(compiler.sources / header, tmp_path)
    (tmp_path / "quotients.cu").write_text(
        '#include "linear.cuh"\n'
        "ENTRY void quotients(const float* a, const float* d, float* out, int count) {\n"
        "  for (int i = threadIdx.x; i < count; i += blockDim.x) out[i] = quotient(a[i], d[i]);\n"
        "}\n"
    )
    compiler.sources = tmp_path
    defines = {"BF16": 1, "EPILOGUE": int(Epilogue.GATED)}
    kernel = compiler.kernel("quotients", "quotients", defines, threads=32, shared=0)
    gates = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).float()
    divisors = 1 + gates.neg().exp()
    want, have = gates / divisors, torch.empty_like(gates)
    kernel.launch((1,), (gates, divisors, have, len(gates)), overlap=False)
    known = ~want.isnan()
    assert torch.equal(have.isnan(), ~known)
    assert torch.equal(have[known].view(torch.int32), want[known].view(torch.int32))


@pytest.mark.parametrize("arch", [75, 80, 86, 89, 90])
def test_ring_and_blocks_fit_the_chip(arch):
    for tile in BLOCK_TILES:
        stages, blocks = depth_of(tile, arch)
        assert stages >= 2
        whole = shared_limit(arch) + (1024 if arch >= 80 else 0)
        assert blocks * (stages * tile.stage + (1024 if arch >= 80 else 0)) <= whole


def test_small_tiles_are_picked_where_large_ones_leave_multiprocessors_idle():
    assert best_tile(4096, 16384, 132) == BlockTile(128, 128)
    assert best_tile(65, 3072, 132) == BlockTile(64, 64)
    assert best_tile(64, 16384, 108).rows == 64


@pytest.mark.parametrize("chip", [80, 86, 87, 89, 90, 100, 120])
def test_cut_of_few_rows_fits_the_chip_and_pairs_gate_and_up(chip):
    arch = min(chip, 90)
    most = linear.most_rows(arch, chip)
    assert most >= 16
    for tile in (Tile(5, 3), Tile(3, 4), Tile(4, 2, 2), Tile(8, 2), Tile(1, 2)):
        for groups in (1, 2, 4, 6, 8):
            for gated in (False, True):
                if 8 * groups > most:
                    continue
                units, stages = linear.cut_for(tile, groups, arch, chip, gated=gated)
                assert linear.shared_bytes(groups, units, stages, arch) <= shared_limit(arch, chip)
                assert stages >= 2 and units >= 1 and not (gated and units % 2)
