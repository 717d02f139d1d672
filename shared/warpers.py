"""Temperature, top-k, top-p and min-p, in transformers' order and meaning.

All rows run together whatever their parameters, and no row depends on another. Where
transformers leaves ties to its sort, here every token as likely as the last one kept is
kept too, so that the outcome does not depend on the sort.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from outrider.shared.types import Decoding
from torch import Tensor

# Below this, logits divided by the temperature can overflow float32: they are shifted first.
_TINY_TEMPERATURE = 1e-3
# On the CPU a full sort costs 0.5 ms a row, the top of one 0.02 ms: top-p looks at these
# many entries before it sorts them all.
_TOP_P_TRIES = (64, 1024)


def truncates(d: Decoding) -> bool:
    """Whether sampling with ``d`` drops tokens by rank or probability."""
    return d.temperature > 0 and (d.top_k > 0 or d.top_p < 1.0 or d.min_p > 0.0)


def warp(scores: Tensor, decodings: Sequence[Decoding]) -> Tensor:
    """Logits [rows, vocab] float32 as sampling wants them; -inf for dropped tokens.

    Rows at temperature 0 are left alone, as transformers' greedy decoding does. Returns
    ``scores`` itself if nothing applies; it is never written to.
    """
    sampled = [d.temperature > 0 for d in decodings]
    if any(s and d.temperature != 1.0 for s, d in zip(sampled, decodings, strict=True)):
        scores = _heat(scores, [d.temperature if d.temperature > 0 else 1.0 for d in decodings])
    if not any(truncates(d) for d in decodings):
        return scores
    top_k = [d.top_k if s else 0 for s, d in zip(sampled, decodings, strict=True)]
    top_p = [d.top_p if s else 1.0 for s, d in zip(sampled, decodings, strict=True)]
    min_p = [d.min_p if s else 0.0 for s, d in zip(sampled, decodings, strict=True)]
    if any(top_k):
        scores = _keep_top_k(scores, top_k)
    nucleus = [i for i, p in enumerate(top_p) if p < 1.0]
    if nucleus:
        scores = _keep_top_p(scores, nucleus, [top_p[i] for i in nucleus], top_k)
    if any(p > 0 for p in min_p):
        floor = scores.amax(-1, keepdim=True) + _column(min_p, scores).log()
        scores = scores.masked_fill(scores < floor, -math.inf)
    return scores


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _heat(scores: Tensor, temperatures: list[float]) -> Tensor:
    """Divides by the temperature; a column also for equal ones, so that rows never differ
    by how a device divides by a scalar."""
    if min(temperatures) < _TINY_TEMPERATURE:
        # A shift changes no probability; the largest logit becomes 0 and can't overflow.
        tiny = _column([float(t < _TINY_TEMPERATURE) for t in temperatures], scores) > 0
        peak = scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        scores = torch.where(tiny, scores - peak, scores)
        temperatures = [max(t, 1e-30) for t in temperatures]
    return scores / _column(temperatures, scores)


def _keep_top_k(scores: Tensor, top_k: list[int]) -> Tensor:
    vocab_size = scores.shape[-1]
    limits = [min(k, vocab_size) for k in top_k]
    best = scores.topk(max(limits)).values
    rank = torch.tensor([max(k - 1, 0) for k in limits], device=scores.device)[:, None]
    floor = best.gather(1, rank)
    if 0 in limits:
        floor = floor.masked_fill(_column([float(k == 0) for k in limits], scores) > 0, -math.inf)
    return scores.masked_fill(scores < floor, -math.inf)


def _keep_top_p(scores: Tensor, rows: list[int], top_p: list[float], top_k: list[int]) -> Tensor:
    """Keeps the fewest likeliest tokens that reach ``top_p`` together, in the given rows."""
    part = scores if len(rows) == len(scores) else scores[rows]
    total = part.logsumexp(-1, keepdim=True)
    wanted = _column(top_p, scores)
    floor = _top_p_floor(part, total, wanted, _tries(scores, [top_k[i] for i in rows]))
    if len(rows) < len(scores):
        everywhere = torch.full_like(scores[:, :1], -math.inf)
        everywhere[rows] = floor
        floor = everywhere
    return scores.masked_fill(scores < floor, -math.inf)


def _tries(scores: Tensor, top_k: list[int]) -> list[int]:
    """How many of the best entries to look at, try after try; the last is always enough."""
    vocab_size = scores.shape[-1]
    enough = vocab_size if 0 in top_k else min(max(top_k), vocab_size)
    if scores.device.type != "cpu":
        # Asking whether a try sufficed would make the host wait for the device.
        return [enough]
    return [m for m in _TOP_P_TRIES if m < enough] + [enough]


def _top_p_floor(part: Tensor, total: Tensor, wanted: Tensor, tries: list[int]) -> Tensor:
    """The lowest logit kept in each row, [rows, 1]."""
    best = part.topk(tries[0]).values
    reached = (best - total).exp().cumsum(-1)
    if len(tries) > 1:
        short = (reached[:, -1:] < wanted).squeeze(-1).nonzero().squeeze(-1)
        if len(short) == len(part):
            return _top_p_floor(part, total, wanted, tries[1:])
        floor = _floor_of(best, reached, wanted)
        if len(short):
            floor[short] = _top_p_floor(part[short], total[short], wanted[short], tries[1:])
        return floor
    return _floor_of(best, reached, wanted)


def _floor_of(best: Tensor, reached: Tensor, wanted: Tensor) -> Tensor:
    # A token stays while those before it have not reached top_p: at least the first does.
    kept = (reached < wanted).sum(-1, keepdim=True)
    return best.gather(1, kept.clamp_(max=best.shape[-1] - 1))
