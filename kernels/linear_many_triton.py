"""Linear layers of many rows on Hopper: ``wgmma`` fed by its copy engine, in Triton.

A row's bits are those of ``linear.cu``: the instructions for few and for many rows give the same
sum of 16 products, whatever the order inside (measured, docs/numerics.md); so it is enough that
both take the same 16 consecutive k at a time, ascending, and add the eight slices of k one after
the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from outrider.kernels.linear_shapes import Epilogue

CHUNK = 64
"""k of one step of the pipeline; slices end where chunks do."""


@triton.jit
def ends_slice(c, CHUNKS: tl.constexpr):
    """Whether chunk ``c`` is the last of its slice: slice s begins at chunk s CHUNKS // 8."""
    if CHUNKS % 8 == 0:
        return (c + 1) % (CHUNKS // 8) == 0
    return (8 * c + 15 + CHUNKS) // CHUNKS != (8 * c + 7 + CHUNKS) // CHUNKS


@triton.jit(do_not_specialize=["rows"])
def kernel(
    x,
    w,
    bias,
    residual,
    out,
    rows,
    N,
    K: tl.constexpr,
    EPILOGUE: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    """Each program makes every program count-th tile of [BLOCK_M, BLOCK_N] outputs."""
    columns = N
    if EPILOGUE == 3:
        columns = N // 2
    down = tl.cdiv(rows, BLOCK_M)
    across = tl.cdiv(columns, BLOCK_N)
    # Eight tiles of columns at a time, so that w is read once and x from the L2 cache.
    band = 8 * down
    chunks: tl.constexpr = K // 64
    programs = tl.num_programs(0)
    for tile in tl.range(
        tl.program_id(0), down * across, programs, flatten=False, warp_specialize=SPECIALIZE
    ):
        left = tile // band * 8
        width = tl.minimum(across - left, 8)
        n0 = (left + tile % band % width) * BLOCK_N
        m0 = tile % band // width * BLOCK_M
        y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for c in range(0, chunks):
            a = x.load([m0, c * 64])
            y = tl.dot(a, w.load([n0, c * 64]).T, y)
            if EPILOGUE == 3:
                z = tl.dot(a, w.load([columns + n0, c * 64]).T, z)
            if ends_slice(c, chunks):
                total += y
                y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                if EPILOGUE == 3:
                    up += z
                    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        r = m0 + tl.arange(0, BLOCK_M)
        n = n0 + tl.arange(0, BLOCK_N)
        inside = n < columns
        stored = (r < rows)[:, None] & inside[None, :]
        if BIAS:
            total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
            if EPILOGUE == 3:
                up += tl.load(bias + columns + n, mask=inside, other=0.0).to(tl.float32)[None, :]
        kind = x.dtype
        place = r[:, None].to(tl.int64) * columns + n[None, :]
        if EPILOGUE == 1:
            tl.store(out + place, total, mask=stored)
        elif EPILOGUE == 2:
            before = tl.load(residual + place, mask=stored, other=0.0).to(tl.float32)
            tl.store(out + place, (before + total.to(kind).to(tl.float32)).to(kind), mask=stored)
        elif EPILOGUE == 3:
            gate = total.to(kind).to(tl.float32)
            active = tl.div_rn(gate, 1.0 + tl.exp(-gate)).to(kind).to(tl.float32)
            tl.store(out + place, (active * up.to(kind).to(tl.float32)).to(kind), mask=stored)
        else:
            tl.store(out + place, total.to(kind), mask=stored)


@dataclass(frozen=True, slots=True)
class Cut:
    """How the work is cut; it changes no bit. ``columns`` counts outputs of a tile."""

    rows: int
    columns: int
    warps: int
    stages: int
    specialize: bool = False


def cut_for(rows: int, columns: int, gated: bool, programs: int) -> Cut:
    """What measured best on an H100 (docs/results/many-rows.md)."""
    if rows <= 64:
        return Cut(64, 32 if gated else 64, 4, 5)
    wide = Cut(128, 64 if gated else 128, 8, 4)
    tiles = -(-rows // wide.rows) * -(-columns // wide.columns)
    return wide if tiles >= programs else Cut(64, 32 if gated else 64, 4, 5)


class ManyRows:
    """Linear layers of any number of rows on one device, with ``linear``'s arguments."""

    def __init__(self, processors: int) -> None:
        """``processors``: multiprocessors of the device."""
        self._processors = processors
        self._descriptors: dict[tuple[int, tuple[int, ...], int], TensorDescriptor] = {}

    def __call__(
        self,
        *,
        x: Tensor,
        w: Tensor,
        out: Tensor,
        rows: int,
        epilogue: Epilogue,
        bias: Tensor | None,
        residual: Tensor | None,
        cut: Cut | None = None,
    ) -> None:
        """See ``linear.reference``; x is normalised already. ``cut``: instead of the best one."""
        n, k = w.shape
        gated = epilogue == Epilogue.GATED
        columns = n // 2 if gated else n
        cut = cut or cut_for(rows, columns, gated, self._processors)
        tiles = triton.cdiv(rows, cut.rows) * triton.cdiv(columns, cut.columns)
        programs = min(self._processors, tiles)
        kernel[(programs,)](
            self._of(x, cut.rows), self._of(w, cut.columns), x if bias is None else bias,
            x if residual is None else residual, out, rows, n, K=k, EPILOGUE=int(epilogue),
            BIAS=bias is not None, BLOCK_M=cut.rows, BLOCK_N=cut.columns,
            SPECIALIZE=cut.specialize, num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip

    def _of(self, tensor: Tensor, block: int) -> TensorDescriptor:
        key = (tensor.data_ptr(), tuple(tensor.shape), block)
        if key not in self._descriptors:
            self._descriptors[key] = TensorDescriptor.from_tensor(tensor, [block, CHUNK])
        return self._descriptors[key]


def why_not(device: torch.device) -> str | None:
    """Why this can't run, or not with these bits; None where it can."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "the chip is not a Hopper"
    return None
