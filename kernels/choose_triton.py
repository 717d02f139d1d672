"""The choice of tokens in Triton: programs that share a row, then one that compares them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def log1p(x):
    """Accurate for small x from log alone (Kahan): log(y) x / (y - 1) with y = 1 + x."""
    y = 1.0 + x
    same = y == 1.0
    safe = tl.where(same, 2.0, y)
    return tl.where(same, x, tl.log(safe) * (x / (safe - 1.0)))


@triton.jit
def part(
    logits,
    rows,
    temperatures,
    seeds,
    positions,
    offset,
    winners,
    ids,
    vocabulary,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (b, i): the best of BLOCK token ids of entry i."""
    b, i = tl.program_id(0), tl.program_id(1)
    row = i
    if ROWS:
        row = tl.load(rows + i)
    token = b * BLOCK + tl.arange(0, BLOCK)
    seen = token < vocabulary
    y = tl.load(logits + row.to(tl.int64) * vocabulary + token, mask=seen, other=float("-inf"))
    temperature = tl.load(temperatures + i)
    if temperature > 0:
        seed = tl.load(seeds + i)
        position = tl.load(positions + i) + offset
        quad = (token >> 2).to(tl.uint32)
        zero = quad * 0
        w0, w1, w2, w3 = tl.philox(seed, quad, zero + position.to(tl.uint32), zero, zero)
        lane = token & 3
        word = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
        u = tl.minimum(
            word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.999999940395355
        )
        y = tl.where(seen, y / temperature - tl.log(-log1p(-u)), float("-inf"))
    # NaN or +inf anywhere: a winner that says so.
    bad = tl.sum((seen & ~(y < float("inf"))).to(tl.int32), 0) > 0
    y = tl.where(y < float("inf"), y, float("-inf"))
    best = tl.max(y, 0)
    first = tl.min(tl.where(y == best, token, 2147483647), 0)
    best = tl.where(bad, float("inf"), best)
    first = tl.where(bad, -1, first)
    at = i * tl.num_programs(0) + b
    tl.store(winners + at, best)
    tl.store(ids + at, first)


@triton.jit
def finish(winners, ids, tokens, blocks, vocabulary, BLOCK: tl.constexpr):
    """The best of the parts; parts are in order of token id."""
    i = tl.program_id(0)
    b = tl.arange(0, BLOCK)
    seen = b < blocks
    y = tl.load(winners + i * blocks + b, mask=seen, other=float("-inf"))
    token = tl.load(ids + i * blocks + b, mask=seen, other=2147483647)
    best = tl.max(y, 0)
    first = tl.min(tl.where(y == best, token, 2147483647), 0)
    tl.store(tokens + i, tl.where(best > float("-inf"), first, -1))


def launch_choose(
    *,
    logits: Tensor,
    rows: Tensor | None,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    offset: int,
    tokens: Tensor,
    count: int,
    overlap: bool = False,
) -> None:
    """See ``choose.reference``."""
    vocabulary, block = logits.shape[1], 2048
    blocks = triton.cdiv(vocabulary, block)
    winners = torch.empty(count * blocks, device=logits.device)
    ids = torch.empty(count * blocks, device=logits.device, dtype=torch.int32)
    part[(blocks, count)](
        logits, positions if rows is None else rows, temperatures, seeds, positions, offset,
        winners, ids, vocabulary, ROWS=rows is not None, BLOCK=block,
    )  # fmt: skip
    finish[(count,)](winners, ids, tokens, blocks, vocabulary, BLOCK=triton.next_power_of_2(blocks))
