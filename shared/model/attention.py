"""Attention of a few query rows over pieces of the arena, in PyTorch.

Keys and values stay where they are: where a sequence's positions lie in several pieces (a ring
that has wrapped, a branch and its parent's prefix), the *scores* of the pieces are joined, never
the KV. The order of the keys does not matter to attention, only the mask does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

# Query heads that share a KV head are folded into rows up to this many, so that their keys and
# values are read once for all of them: with four heads to one, 2,048 keys and one row, 135 µs
# instead of 318 µs on one core, 319 µs instead of 687 µs with five rows. Beyond it the mask, which
# is folded too, costs more than that saves.
FOLDED_ROWS = 64

# Keys and values of one piece, each [1, kv_heads, count, dim].
Pieces = Sequence[tuple[Tensor, Tensor]]


def visibility(
    rows: int,
    start: int,
    first: int,
    *,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """Additive mask ``[rows, keys]`` (0 or -inf), or None where every row sees every key.

    Row i is position ``start + i`` and sees positions ``p <= start + i``, with a window only
    those ``p > start + i - window``. Keys are positions ``first … start + rows - 1``.
    """
    lowest_of_last = start + rows - window if window is not None else 0
    if rows == 1 and lowest_of_last <= first:
        return None
    keys = start + rows - first
    mask = torch.full((rows, keys), float("-inf"), dtype=dtype, device=device)
    mask.triu_(start - first + 1)
    if window is not None and lowest_of_last > first:
        low = torch.full((rows, keys), float("-inf"), dtype=dtype, device=device)
        # nan_to_num is not needed: each entry of the sum is 0 or -inf.
        mask += low.tril_(start - first - window)
    return mask


def fold_mask(mask: Tensor | None, rows: int, group: int) -> Tensor | None:
    """The mask of ``rows * group`` folded rows, from that of ``rows``; one of those comes back."""
    if mask is None or group == 1 or mask.shape[0] != rows or rows * group > FOLDED_ROWS:
        return mask
    return mask.repeat(group, 1)


def attend(
    query: Tensor,
    pieces: Pieces,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """``query`` [1, heads, rows, dim] over ``pieces`` -> [1, heads, rows, value_dim].

    ``mask``: additive, [rows, keys], or folded by ``fold_mask``. ``bias``: additive,
    [heads, rows or 1, keys] (ALiBi). ``sinks``: [heads], logits of a key without a value.
    ``softcap``: scores become ``softcap * tanh(scores / softcap)``. ``causal``: the rows are all
    the keys, no mask is needed.
    Grouped queries: ``heads`` is a multiple of the pieces' KV heads. Softmax in float32.
    """
    _, heads, rows, _ = query.shape
    keys, values = pieces[0]
    kv_heads = keys.shape[1]
    if len(pieces) == 1 and softcap is None and sinks is None:
        group = heads // kv_heads
        if group > 1 and rows * group <= FOLDED_ROWS and not causal and bias is None:
            return functional.scaled_dot_product_attention(
                query.reshape(1, kv_heads, group * rows, -1),
                keys,
                values,
                attn_mask=fold_mask(mask, rows, group),
                scale=scale,
            ).view(1, heads, rows, -1)
        if bias is not None:
            mask = bias if mask is None else bias + mask
        return functional.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=mask,
            is_causal=causal and rows > 1,
            scale=scale,
            enable_gqa=group > 1,
        )
    # [kv_heads, group * rows, dim]: one batched product serves a whole group of query heads.
    folded = query.reshape(kv_heads, heads // kv_heads * rows, -1)
    parts = [torch.matmul(folded, k[0].transpose(1, 2)) for k, _ in pieces]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    scores = joined.view(heads, rows, -1).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores + mask[:rows]
    elif causal and rows > 1:
        scores = scores + torch.full_like(scores[0], float("-inf")).triu_(1)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(heads, 1, 1).expand(-1, rows, 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1).to(query.dtype).view(kv_heads, -1, scores.shape[-1])
    total, begin = None, 0
    for _, v in pieces:
        part = torch.matmul(weights[..., begin : begin + v.shape[2]], v[0])
        begin += v.shape[2]
        total = part if total is None else total + part
    assert total is not None
    return total.view(1, heads, rows, -1)
