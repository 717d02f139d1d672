"""Attention of a ragged batch over the KV arena, with rotary embedding and KV append.

Each sequence brings any number of query rows; keys and values stay where they are. KV is cut at
fixed multiples of positions and the cuts are combined in a fixed order, so a row's bits depend on
nothing but its own sequence, and not on how many rows it comes with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from outrider.kernels.attention_shapes import Heads, Work, need
from outrider.kernels.operation import (
    Arguments,
    Call,
    Implementation,
    Operation,
    Tools,
    always,
    no_cuda_source,
    no_triton,
)


def rope_table(inverse_frequencies: Tensor, positions: int, scaling: float = 1.0) -> Tensor:
    """(cos, sin) of every position: float32 [positions, head_dim / 2, 2], times ``scaling``."""
    at = torch.arange(positions, device=inverse_frequencies.device, dtype=torch.float32)
    angles = at[:, None] * inverse_frequencies.float()[None, :]
    return torch.stack((angles.cos(), angles.sin()), -1).mul_(scaling).contiguous()


def _embedded(
    x: Tensor, positions: Tensor, rope: Tensor, norm: Tensor | None, eps: float
) -> Tensor:
    """[rows, heads, head_dim] normalised and rotated, rounded where the kernels round."""
    if norm is not None:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        x = norm * (wide * scale).to(x.dtype)
    cos, sin = rope[positions][:, None, :, 0], rope[positions][:, None, :, 1]
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1).to(x.dtype)


def _slots(p: Tensor, where: Sequence[int], ring: int) -> Tensor:
    """Where positions ``p`` live; ``where``: the sequence's start, its prefix's, its prefix_len."""
    start, prefix_start, prefix_len = where
    prefix = p < prefix_len
    place = torch.where(prefix, p, p - prefix_len)
    return torch.where(prefix, prefix_start, start) + (place % ring if ring else place)


def reference(
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
    """Writes the new rows' keys and values into the arena and ``out`` [rows, heads · head_dim].

    ``qkv`` [rows, (heads + 2 kv_heads) head_dim], before rotation; ``keys``, ``values``: one
    layer of the arena [tokens, kv_heads, head_dim]. int32 per sequence: ``starts`` (first slot),
    ``first_rows``, ``row_counts``, ``positions`` (of the first row, plus ``offset``), and, where
    branches of another sequence are among them, ``prefix_lens`` (0: none): positions below it are
    only read, from the slots from ``prefix_starts`` on, and position ``prefix_len`` is the first in
    ``starts``. ``rows``: the most rows of one sequence; in a ring they and the window have room
    together. ``rope``: see ``rope_table``.
    """
    h, kv, dim = heads.heads, heads.kv_heads, heads.head_dim
    if prefix_starts is None or prefix_lens is None:
        prefix_starts = prefix_lens = torch.zeros_like(starts)
    columns = (first_rows, row_counts, positions, starts, prefix_starts, prefix_lens)
    table = torch.stack([column[:sequences] for column in columns], -1)
    for first, count, position, *where in table.tolist():
        if count == 0:
            continue
        position += offset
        at = torch.arange(position, position + count, device=qkv.device)
        own = qkv[first : first + count].view(count, h + 2 * kv, dim)
        slots = _slots(at, where, heads.ring)
        keys[slots] = _embedded(own[:, h : h + kv], at, rope, k_norm, eps)
        values[slots] = own[:, h + kv :]
        query = _embedded(own[:, :h], at, rope, q_norm, eps).float()
        low = max(0, position - heads.window + 1) if heads.window else 0
        seen = torch.arange(low, position + count, device=qkv.device)
        slots = _slots(seen, where, heads.ring)
        k = keys[slots].float().repeat_interleave(heads.group, 1)
        v = values[slots].float().repeat_interleave(heads.group, 1)
        scores = torch.einsum("rhd,thd->hrt", query, k) / math.sqrt(dim)
        hidden = seen[None, :] > at[:, None]
        if heads.window:
            hidden |= seen[None, :] <= at[:, None] - heads.window
        weights = torch.softmax(scores.masked_fill(hidden, -math.inf), -1)
        mixed = torch.einsum("hrt,thd->rhd", weights, v).reshape(count, -1)
        out[first : first + count] = mixed.to(out.dtype)


def _cuda(tools: Tools) -> Call:
    from outrider.kernels.attention_cuda import launcher

    return launcher(tools)


def _triton(tools: Tools) -> Call:
    from outrider.kernels.attention_triton import launch_attention

    return launch_attention


def _case(
    device: torch.device,
    dtype: torch.dtype,
    heads: Heads,
    spans: Sequence[tuple[int, int]],
    *,
    norms: bool = False,
    prefixes: Sequence[int] = (),
) -> Arguments:
    """``spans``: (position of the first row, rows) per sequence; ``prefixes``: how many positions
    of each lie where the others have them too."""

    def random(*size: int) -> Tensor:
        return torch.randn(size, device=device).to(dtype)

    def integers(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    dim, total = heads.head_dim, sum(count for _, count in spans)
    sizes = [heads.ring or position + count + 3 for position, count in spans]
    shared = 2 + max(prefixes, default=0)
    starts = [shared + sum(sizes[:i]) for i in range(len(spans))]
    tokens = shared + sum(sizes)
    rates = 10000.0 ** -(torch.arange(0, dim, 2, device=device) / dim)
    rows = max(count for _, count in spans)
    return {
        "qkv": random(total, (heads.heads + 2 * heads.kv_heads) * dim),
        "keys": random(tokens, heads.kv_heads, dim),
        "values": random(tokens, heads.kv_heads, dim),
        "out": torch.zeros(total, heads.heads * dim, device=device, dtype=dtype),
        "starts": integers(starts),
        "first_rows": integers([sum(c for _, c in spans[:i]) for i in range(len(spans))]),
        "row_counts": integers([count for _, count in spans]),
        "positions": integers([position - 1 for position, _ in spans]),
        "offset": 1,
        "sequences": len(spans),
        "rows": rows,
        "rope": rope_table(rates, 1024),
        "heads": heads,
        "prefix_starts": integers([2] * len(spans)) if prefixes else None,
        "prefix_lens": integers(prefixes) if prefixes else None,
        "work": Work.of(heads, len(spans) * need(heads, [max(sizes) + 64], rows), device),
        "q_norm": 1 + 0.1 * random(dim) if norms else None,
        "k_norm": 1 + 0.1 * random(dim) if norms else None,
    }


def _cases(device: torch.device, dtype: torch.dtype) -> Iterator[Arguments]:
    yield _case(device, dtype, Heads(6, 2, 128), [(100, 5)])
    yield _case(device, dtype, Heads(8, 2, 64), [(0, 3), (62, 5), (200, 1), (7, 0)])
    yield _case(device, dtype, Heads(3, 1, 128), [(60, 17), (5, 1)], norms=True)
    yield _case(device, dtype, Heads(4, 4, 64, 70, 90), [(150, 5), (60, 4)])
    prefixes, ring = (130, 0, 5), Heads(2, 2, 128, 70, 110)
    yield _case(device, dtype, Heads(4, 2, 64), [(131, 2), (3, 5), (40, 1)], prefixes=prefixes)
    yield _case(device, dtype, Heads(6, 2, 64), [(70, 34), (7, 0), (3, 1), (0, 33)], norms=True)
    yield _case(device, dtype, ring, [(150, 40), (60, 4)], prefixes=(120, 0))
    yield _case(device, dtype, Heads(4, 1, 64), [(131, 34), (3, 1), (40, 20)], prefixes=prefixes)


OPERATION = Operation(
    "attention",
    "rotary embedding, KV append and attention over the arena",
    reference,
    ("out", "keys", "values"),
    _cases,
    {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3},
    (
        Implementation("cuda", no_cuda_source, _cuda),
        Implementation("triton", no_triton, _triton, "three launches instead of one or two"),
        Implementation(
            "torch", always, lambda tools: reference, "a dozen launches a sequence, and host waits"
        ),
    ),
)
