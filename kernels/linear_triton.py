"""Linear layers of at most 64 rows in Triton.

One program makes BLOCK_N columns of all rows. Rows go through one tile of 16 at a time, each
tile by the same products in the same order of K, so that the number of rows changes no bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from outrider.kernels.linear_shapes import PLAIN, Epilogue, Tile


@triton.jit
def tile_of(
    x, norm, scale, row0, rows, k0, K: tl.constexpr, NORM: tl.constexpr, BLOCK_K: tl.constexpr
):
    """[16, BLOCK_K] of x, normalised."""
    r = row0 + tl.arange(0, 16)
    k = k0 + tl.arange(0, BLOCK_K)
    inside = k < K
    seen = (r < rows)[:, None] & inside[None, :]
    a = tl.load(x + r[:, None] * K + k[None, :], mask=seen, other=0.0)
    if NORM:
        w = tl.load(norm + k, mask=inside, other=0.0).to(tl.float32)
        rounded = (a.to(tl.float32) * scale[:, None]).to(a.dtype).to(tl.float32)
        a = (rounded * w[None, :]).to(a.dtype)
    return a


@triton.jit
def scale_of(x, row0, rows, K: tl.constexpr, eps, BLOCK_K: tl.constexpr):
    """1 / rms of 16 rows."""
    r = row0 + tl.arange(0, 16)
    total = tl.zeros((16,), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        seen = (r < rows)[:, None] & (k < K)[None, :]
        a = tl.load(x + r[:, None] * K + k[None, :], mask=seen, other=0.0).to(tl.float32)
        total += tl.sum(a * a, 1)
    return tl.rsqrt(total / K + eps)


@triton.jit
def kernel(
    x,
    w,
    norm,
    bias,
    residual,
    out,
    rows,
    N,
    eps,
    K: tl.constexpr,
    EPILOGUE: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (i, j): columns i BLOCK_N …, rows 16 j …"""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row0 = tl.program_id(1) * 16
    half = N
    if EPILOGUE == 3:
        half = N // 2
    inside = n < half
    scale = tl.zeros((16,), tl.float32)
    if NORM:
        scale = scale_of(x, row0, rows, K, eps, BLOCK_K)
    y = tl.zeros((16, BLOCK_N), tl.float32)
    z = tl.zeros((16, BLOCK_N), tl.float32)
    at = n.to(tl.int64) * K
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        seen = inside[:, None] & (k < K)[None, :]
        a = tile_of(x, norm, scale, row0, rows, k0, K, NORM, BLOCK_K)
        b = tl.load(w + at[:, None] + k[None, :], mask=seen, other=0.0)
        y = tl.dot(a, tl.trans(b), y, input_precision=PRECISION)
        if EPILOGUE == 3:
            c = tl.load(w + half.to(tl.int64) * K + at[:, None] + k[None, :], mask=seen, other=0.0)
            z = tl.dot(a, tl.trans(c), z, input_precision=PRECISION)
    r = row0 + tl.arange(0, 16)
    stored = (r < rows)[:, None] & inside[None, :]
    if BIAS:
        y += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
        if EPILOGUE == 3:
            z += tl.load(bias + half + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    kind = x.dtype.element_ty
    place = r[:, None] * half + n[None, :]
    if EPILOGUE == 1:
        tl.store(out + place, y, mask=stored)
    elif EPILOGUE == 2:
        before = tl.load(residual + place, mask=stored, other=0.0).to(tl.float32)
        tl.store(out + place, (before + y.to(kind).to(tl.float32)).to(kind), mask=stored)
    elif EPILOGUE == 3:
        gate = y.to(kind).to(tl.float32)
        active = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
        tl.store(out + place, (active * z.to(kind).to(tl.float32)).to(kind), mask=stored)
    else:
        tl.store(out + place, y.to(kind), mask=stored)


def launch_linear(
    *,
    x: Tensor,
    w: Tensor,
    out: Tensor,
    rows: int,
    epilogue: Epilogue = Epilogue.STORE,
    norm: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    tile: Tile = PLAIN,
    overlap: bool = False,
) -> None:
    """See ``linear.reference``."""
    n, k = w.shape
    columns = n // 2 if epilogue == Epilogue.GATED else n
    block = 16 if columns <= 16384 else 32
    kernel[(triton.cdiv(columns, block), triton.cdiv(rows, 16))](
        x, w, x if norm is None else norm, x if bias is None else bias,
        x if residual is None else residual, out, rows, n, eps, K=k,
        EPILOGUE=int(epilogue), NORM=norm is not None, BIAS=bias is not None,
        BLOCK_N=block, BLOCK_K=min(256, triton.next_power_of_2(k)),
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=4, num_stages=4,
    )  # fmt: skip
