"""Attention over the arena in Triton: append, cuts, combination; or, for many rows of one
sequence, append and one program for some rows and all their cuts."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from outrider.kernels.attention_shapes import Heads, Work, many


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
def slot_of(p, s, starts, prefix_starts, prefix_lens, ring, BRANCHES: tl.constexpr):
    """The slot of position ``p`` of sequence ``s``."""
    place = p
    start = tl.load(starts + s)
    if BRANCHES:
        own = tl.load(prefix_lens + s)
        start = tl.where(p < own, tl.load(prefix_starts + s), start)
        place = tl.where(p < own, p, p - own)
    if ring > 0:
        place = place % ring
    return (start + place).to(tl.int64)


@triton.jit
def append(
    qkv,
    keys,
    values,
    starts,
    prefix_starts,
    prefix_lens,
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
    BRANCHES: tl.constexpr,
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
            slot = slot_of(position, s, starts, prefix_starts, prefix_lens, ring, BRANCHES)
            to = (slot * kv_heads + head - heads) * DIM
            tl.store(keys + to + i, low.to(keys.dtype.element_ty))
            tl.store(keys + to + DIM // 2 + i, high.to(keys.dtype.element_ty))
            j = tl.arange(0, DIM)
            tl.store(values + to + j, tl.load(qkv + at + kv_heads * DIM + j))


@triton.jit
def load_queries(qkv, first, q, group, head, heads, kv_heads, used, DIM: tl.constexpr):
    """Packed queries ``q`` of a KV head, [queries, DIM]."""
    row = (first + q // group).to(tl.int64)
    at = row * ((heads + 2 * kv_heads) * DIM) + (head * group + q % group) * DIM
    return tl.load(qkv + at[:, None] + tl.arange(0, DIM)[None, :], mask=used[:, None], other=0.0)


@triton.jit
def one_cut(
    query,
    keys,
    values,
    slot,
    p,
    end,
    own,
    head,
    kv_heads,
    window,
    scale,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Softmax of queries at positions ``own`` over positions ``p``, unnormalised: peak, sum of
    the weights, weighted sum of the values."""
    d = tl.arange(0, DIM)
    at = (slot * kv_heads + head) * DIM
    written = p < end
    k = tl.load(keys + at[:, None] + d[None, :], mask=written[:, None], other=0.0)
    scores = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale
    seen = p[None, :] <= own[:, None]
    if window > 0:
        seen = seen & (p[None, :] > own[:, None] - window)
    scores = tl.where(seen, scores, float("-inf"))
    top = tl.max(scores, 1)
    weights = tl.exp2(scores - tl.where(top == float("-inf"), 0.0, top)[:, None])
    v = tl.load(values + at[:, None] + d[None, :], mask=written[:, None], other=0.0)
    return top, tl.sum(weights, 1), tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)


@triton.jit
def cut(
    qkv,
    keys,
    values,
    starts,
    prefix_starts,
    prefix_lens,
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
    BRANCHES: tl.constexpr,
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
        used = q < count * group
        query = load_queries(
            qkv, tl.load(first_rows + s), q, group, head, heads, kv_heads, used, DIM
        )
        p = begin + tl.arange(0, CUT)
        slot = slot_of(p, s, starts, prefix_starts, prefix_lens, ring, BRANCHES)
        own = position + q // group
        top, total, mixed = one_cut(
            query, keys, values, slot, p, end, own, head, kv_heads, window, scale, DIM, PRECISION
        )
        to = ((s * cuts + c) * kv_heads + head).to(tl.int64) * queries + q
        d = tl.arange(0, DIM)
        tl.store(partial + to[:, None] * DIM + d[None, :], mixed, mask=used[:, None])
        tl.store(stats + to * 2, top, mask=used)
        tl.store(stats + to * 2 + 1, total, mask=used)


@triton.jit
def all_cuts(
    qkv,
    keys,
    values,
    out,
    starts,
    prefix_starts,
    prefix_lens,
    first_rows,
    row_counts,
    positions,
    offset,
    heads,
    kv_heads,
    window,
    ring,
    scale,
    BRANCHES: tl.constexpr,
    DIM: tl.constexpr,
    CUT: tl.constexpr,
    QUERIES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (QUERIES query rows, sequence, KV head): the cuts that they see, ascending."""
    s, head = tl.program_id(1), tl.program_id(2)
    count = tl.load(row_counts + s)
    position = tl.load(positions + s) + offset
    group = heads // kv_heads
    q0 = tl.program_id(0) * QUERIES
    if q0 < count * group:
        q = q0 + tl.arange(0, QUERIES)
        used = q < count * group
        first = tl.load(first_rows + s)
        query = load_queries(qkv, first, q, group, head, heads, kv_heads, used, DIM)
        own = position + q // group
        end = position + tl.minimum(count, (q0 + QUERIES - 1) // group + 1)
        begin = 0
        if window > 0:
            begin = tl.maximum(0, position + q0 // group - window + 1) // CUT * CUT
        top = tl.full((QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        mixed = tl.zeros((QUERIES, DIM), tl.float32)
        while begin < end:
            p = begin + tl.arange(0, CUT)
            slot = slot_of(p, s, starts, prefix_starts, prefix_lens, ring, BRANCHES)
            peak, weight, part = one_cut(
                query, keys, values, slot, p, end, own, head, kv_heads, window, scale, DIM,
                PRECISION,
            )  # fmt: skip
            higher = tl.maximum(top, peak)
            base = tl.where(higher == float("-inf"), 0.0, higher)
            old, new = tl.exp2(top - base), tl.exp2(peak - base)
            total = total * old + weight * new
            mixed = mixed * old[:, None] + part * new[:, None]
            top = higher
            begin += CUT
        row = (first + q // group).to(tl.int64)
        to = row * heads * DIM + (head * group + q % group) * DIM
        mixed = (mixed / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + to[:, None] + tl.arange(0, DIM)[None, :], mixed, mask=used[:, None])


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
    prefix_starts: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    blocks: int = 2,
    overlap: bool = False,
) -> None:
    """See ``attention.reference``; queries in ``qkv`` are rotated in place."""
    dim, kv, queries = heads.head_dim, heads.kv_heads, rows * heads.group
    scale = 1.4426950408889634 / dim**0.5
    shape = {"DIM": dim, "CUT": heads.cut}
    precision = "ieee" if qkv.element_size() == 4 else "tf32"
    branches = prefix_lens is not None
    # Where nobody has a prefix these two are not read.
    prefixes = (prefix_starts, prefix_lens) if branches else (starts, starts)
    where = (starts, *prefixes, first_rows, row_counts, positions, offset)
    append[(rows, sequences, heads.heads + kv)](
        qkv, keys, values, *where, rope, qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm, eps, heads.heads, kv, heads.ring, BRANCHES=branches,
        NORM=q_norm is not None, DIM=dim, num_warps=1,
    )  # fmt: skip
    if many(rows):
        size = 64 if dim <= 128 else 32
        all_cuts[(triton.cdiv(queries, size), sequences, kv)](
            qkv, keys, values, out, *where, heads.heads, kv, heads.window, heads.ring, scale,
            BRANCHES=branches, QUERIES=size, PRECISION=precision, **shape,
        )  # fmt: skip
        return
    # Cuts per sequence that the scratch memory has room for; the launch covers them all.
    cuts = work.capacity // (heads.heads * rows * sequences)
    cut[(cuts * kv, sequences, triton.cdiv(queries, 16))](
        qkv, keys, values, *where, work.partial, work.stats, heads.heads, kv, queries,
        heads.window, heads.ring, scale, cuts, BRANCHES=branches, PRECISION=precision, **shape,
    )  # fmt: skip
    combine[(queries, sequences, kv)](
        out, first_rows, row_counts, positions, offset, work.partial, work.stats, heads.heads, kv,
        queries, heads.window, cuts, num_warps=1, **shape,
    )  # fmt: skip
