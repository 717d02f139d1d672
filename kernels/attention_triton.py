"""Attention over the arena in Triton, in three launches: append, cuts, combination."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from outrider.kernels.attention_shapes import Heads, Work


@triton.jit
def embed(from_, at, rope, position, norm, eps, NORM: tl.constexpr, DIM: tl.constexpr):
    """Both halves of one head, normalised and rotated to ``position``; float32 [DIM / 2]."""
    i = tl.arange(0, DIM // 2)
    low = tl.load(from_ + at + i)
    kind = low.dtype
    low = low.to(tl.float32)
    high = tl.load(from_ + at + DIM // 2 + i).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(low * low + high * high, 0) / DIM + eps)
        low = (low * scale).to(kind).to(tl.float32) * tl.load(norm + i).to(tl.float32)
        high = (high * scale).to(kind).to(tl.float32) * tl.load(norm + DIM // 2 + i).to(tl.float32)
        low = low.to(kind).to(tl.float32)
        high = high.to(kind).to(tl.float32)
    turn = rope + (position.to(tl.int64) * (DIM // 2) + i) * 2
    cos, sin = tl.load(turn), tl.load(turn + 1)
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def append(
    qkv,
    keys,
    values,
    starts,
    first_rows,
    row_counts,
    positions,
    offset,
    rope,
    q_norm,
    k_norm,
    eps,
    heads,
    kv_heads,
    ring,
    NORM: tl.constexpr,
    DIM: tl.constexpr,
):
    """Program (row, sequence, head): rotates a query in place, or stores a key and its value."""
    row, s, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if row < tl.load(row_counts + s):
        position = tl.load(positions + s) + offset + row
        stride = (heads + 2 * kv_heads) * DIM
        at = (tl.load(first_rows + s) + row).to(tl.int64) * stride + head * DIM
        i = tl.arange(0, DIM // 2)
        if head < heads:
            low, high = embed(qkv, at, rope, position, q_norm, eps, NORM, DIM)
            tl.store(qkv + at + i, low.to(qkv.dtype.element_ty))
            tl.store(qkv + at + DIM // 2 + i, high.to(qkv.dtype.element_ty))
        else:
            low, high = embed(qkv, at, rope, position, k_norm, eps, NORM, DIM)
            slot = position
            if ring > 0:
                slot = position % ring
            to = ((tl.load(starts + s) + slot).to(tl.int64) * kv_heads + head - heads) * DIM
            tl.store(keys + to + i, low.to(keys.dtype.element_ty))
            tl.store(keys + to + DIM // 2 + i, high.to(keys.dtype.element_ty))
            j = tl.arange(0, DIM)
            tl.store(values + to + j, tl.load(qkv + at + kv_heads * DIM + j))


@triton.jit
def cut(
    qkv,
    keys,
    values,
    starts,
    first_rows,
    row_counts,
    positions,
    offset,
    partial,
    stats,
    heads,
    kv_heads,
    queries,
    window,
    ring,
    scale,
    cuts,
    DIM: tl.constexpr,
    CUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (cut · KV head, sequence, 16 query rows): one cut's softmax, unnormalised."""
    c, head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    s = tl.program_id(1)
    count = tl.load(row_counts + s)
    position = tl.load(positions + s) + offset
    group = heads // kv_heads
    q = tl.program_id(2) * 16 + tl.arange(0, 16)
    low = 0
    if window > 0:
        low = tl.maximum(0, position - window + 1)
    begin = (low // CUT + c) * CUT
    end = position + count
    if (count > 0) & (begin < end) & (tl.program_id(2) * 16 < count * group):
        d = tl.arange(0, DIM)
        stride = (heads + 2 * kv_heads) * DIM
        row = tl.load(first_rows + s) + q // group
        used = q < count * group
        query = tl.load(
            qkv
            + row.to(tl.int64)[:, None] * stride
            + ((head * group + q % group) * DIM)[:, None]
            + d[None, :],
            mask=used[:, None],
            other=0.0,
        )
        p = begin + tl.arange(0, CUT)
        slot = p
        if ring > 0:
            slot = p % ring
        at = ((tl.load(starts + s) + slot).to(tl.int64) * kv_heads + head) * DIM
        written = p < end
        k = tl.load(keys + at[:, None] + d[None, :], mask=written[:, None], other=0.0)
        scores = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale
        own = position + q // group
        seen = (p[None, :] <= own[:, None]) & used[:, None]
        if window > 0:
            seen = seen & (p[None, :] > own[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        top = tl.max(scores, 1)
        none = top == float("-inf")
        weights = tl.exp2(scores - tl.where(none, 0.0, top)[:, None])
        v = tl.load(values + at[:, None] + d[None, :], mask=written[:, None], other=0.0)
        mixed = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        to = ((s * cuts + c) * kv_heads + head).to(tl.int64) * queries + q
        tl.store(partial + to[:, None] * DIM + d[None, :], mixed, mask=used[:, None])
        tl.store(stats + to * 2, top, mask=used)
        tl.store(stats + to * 2 + 1, tl.sum(weights, 1), mask=used)


@triton.jit
def combine(
    out,
    first_rows,
    row_counts,
    positions,
    offset,
    partial,
    stats,
    heads,
    kv_heads,
    queries,
    window,
    cuts,
    DIM: tl.constexpr,
    CUT: tl.constexpr,
):
    """Program (query, sequence, KV head): the cuts in ascending order."""
    q, s, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = tl.load(row_counts + s)
    group = heads // kv_heads
    if q < count * group:
        position = tl.load(positions + s) + offset
        low = 0
        if window > 0:
            low = tl.maximum(0, position - window + 1)
        own = (position + count - 1) // CUT - low // CUT + 1
        d = tl.arange(0, DIM)
        top = float("-inf")
        c = 0
        while c < own:
            at = ((s * cuts + c) * kv_heads + head).to(tl.int64) * queries + q
            top = tl.maximum(top, tl.load(stats + at * 2))
            c += 1
        total = 0.0
        mixed = tl.zeros((DIM,), tl.float32)
        c = 0
        while c < own:
            at = ((s * cuts + c) * kv_heads + head).to(tl.int64) * queries + q
            weight = tl.exp2(tl.load(stats + at * 2) - top)
            total += weight * tl.load(stats + at * 2 + 1)
            mixed += weight * tl.load(partial + at * DIM + d)
            c += 1
        row = tl.load(first_rows + s) + q // group
        to = row.to(tl.int64) * heads * DIM + (head * group + q % group) * DIM
        tl.store(out + to + d, (mixed / total).to(out.dtype.element_ty))


def launch_attention(
    *,
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    starts: Tensor,
    first_rows: Tensor,
    row_counts: Tensor,
    positions: Tensor,
    offset: int,
    sequences: int,
    rows: int,
    rope: Tensor,
    heads: Heads,
    work: Work,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    blocks: int = 2,
    overlap: bool = False,
) -> None:
    """See ``attention.reference``; queries in ``qkv`` are rotated in place."""
    dim, kv, queries = heads.head_dim, heads.kv_heads, rows * heads.group
    # Cuts per sequence that the scratch memory has room for; the launch covers them all.
    cuts = work.capacity // (heads.heads * rows * sequences)
    scale = 1.4426950408889634 / dim**0.5
    append[(rows, sequences, heads.heads + kv)](
        qkv, keys, values, starts, first_rows, row_counts, positions, offset, rope,
        qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm, eps,
        heads.heads, kv, heads.ring, NORM=q_norm is not None, DIM=dim, num_warps=1,
    )  # fmt: skip
    cut[(cuts * kv, sequences, triton.cdiv(queries, 16))](
        qkv, keys, values, starts, first_rows, row_counts, positions, offset, work.partial,
        work.stats, heads.heads, kv, queries, heads.window, heads.ring, scale, cuts,
        DIM=dim, CUT=heads.cut, PRECISION="ieee" if qkv.element_size() == 4 else "tf32",
    )  # fmt: skip
    combine[(queries, sequences, kv)](
        out, first_rows, row_counts, positions, offset, work.partial, work.stats, heads.heads, kv,
        queries, heads.window, cuts, DIM=dim, CUT=heads.cut, num_warps=1,
    )  # fmt: skip
