"""``rejection`` (Leviathan et al. 2023; Chen et al. 2023): the highest acceptance there is.

Accepts ``d ~ q`` with probability ``min(1, p(d)/q(d))`` and otherwise draws from the normalised
positive part of ``p - q``, so the output has the law of the base.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from outrider.shared.core.types import SparseRow
from outrider.shared.sampling.choose import sample
from outrider.shared.sampling.noise import Stream, seed_tensor, uniform
from outrider.verify_service.acceptance import JudgeBatch, JudgeItem


def judge(batch: JudgeBatch, mine: Sequence[int]) -> list[tuple[int, int]]:
    """See ``acceptance.Judge``; one transfer back from the device."""
    device = batch.processed.device
    items, first = [batch.items[i] for i in mine], [batch.first[i] for i in mine]
    k = max(len(item.proposal) for item in items)
    sparse = [[_row_of(item, i) for i in range(len(item.proposal))] for item in items]
    m = max((len(row.ids) for rows in sparse for row in rows), default=1)
    ids = [[_pad(row.ids, m, 0) for row in rows] + [[0] * m] * (k - len(rows)) for rows in sparse]
    q = [
        [_pad(row.probabilities, m, 0.0) for row in rows] + [[0.0] * m] * (k - len(rows))
        for rows in sparse
    ]
    integers = [
        [f, len(item.proposal), len(item.history), *_pad(item.proposal, k, 0)]
        for f, item in zip(first, items, strict=True)
    ]
    packed = torch.tensor(integers, device=device)
    accepted, token = judge_rejection(
        batch.processed,
        packed[:, 0],
        packed[:, 3:],
        torch.tensor(ids, dtype=torch.int64, device=device).view(len(items), k, m),
        torch.tensor(q, dtype=torch.float32, device=device).view(len(items), k, m),
        packed[:, 1],
        seed_tensor([item.decoding.seed for item in items], device),
        packed[:, 2],
    )
    return [(a, t) for a, t in torch.stack((accepted, token), dim=1).tolist()]


def _row_of(item: JudgeItem, i: int) -> SparseRow:
    """The distribution of proposed token ``i``: certain, if none was sent."""
    return item.rows[i] if item.rows else SparseRow((item.proposal[i],), (1.0,))


def _pad(values: Sequence[int] | Sequence[float], size: int, fill: float) -> list[float]:
    return [*values, *[fill] * (size - len(values))]


def accepted_draws(p_at: Tensor, q_at: Tensor, uniforms: Tensor, lengths: Tensor) -> Tensor:
    """How many proposed tokens pass ``u < p/q``, up to the first that fails.

    ``p_at``, ``q_at``: probabilities of the proposed tokens under base and draft, and
    ``uniforms`` in (0, 1), all [items, K]; ``lengths``: int64 [items], each <= K.
    Returns int64 [items].
    """
    inside = torch.arange(p_at.shape[1], device=p_at.device)[None, :] < lengths[:, None]
    # u * q < p, not u < p / q: no division by zero, and p = 0 never passes.
    stands = (uniforms * q_at < p_at) & inside
    return stands.long().cumprod(1).sum(1)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """The positive part of ``p - q`` [rows, vocab], unnormalised; ``p`` where that is empty.

    It is empty only if ``p`` equals ``q``; then nothing is ever rejected but by rounding.
    """
    weights = (p - q).clamp_(min=0)
    return torch.where(weights.sum(-1, keepdim=True) > 0, weights, p)


def judge_rejection(
    processed: Tensor,
    first: Tensor,
    proposals: Tensor,
    q_ids: Tensor,
    q: Tensor,
    lengths: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """The rule for items padded into tensors; returns (accepted, next token), [items].

    ``processed``: processed logits [rows, vocab]; ``first``: each item's first row;
    ``proposals``: [items, K], padded beyond ``lengths``; ``q_ids``, ``q``: the sparse draft
    distributions [items, K, m], padded with probability 0; ``seeds``; ``positions``: those
    of each item's first token. Everything int64 but ``processed`` and ``q``.

    Noise: accept tests take stream ACCEPT, a replacement stream RESIDUAL, the token after a
    wholly accepted proposal stream CHOICE, none of which the draft has looked at.
    """
    k = proposals.shape[1]
    steps = torch.arange(k, device=processed.device)[None, :]
    inside = steps < lengths[:, None]
    at = (first[:, None] + steps).where(inside, first[:, None])
    normaliser = processed.logsumexp(-1)
    p_at = (processed[at, proposals] - normaliser[at]).exp()
    q = q / q.sum(-1, keepdim=True).clamp_(min=1e-30)
    q_at = (q * (q_ids == proposals[..., None])).sum(-1)
    tests = uniform(seeds[:, None], positions[:, None] + steps, stream=Stream.ACCEPT)
    accepted = accepted_draws(p_at, q_at, tests, lengths)

    last = first + accepted
    p = (processed[last] - normaliser[last, None]).exp()
    whole = accepted == lengths
    if k:
        item = torch.arange(len(first), device=processed.device)
        stop = accepted.clamp(max=k - 1)
        rejected_q = torch.zeros_like(p).scatter_add_(1, q_ids[item, stop], q[item, stop])
        p = torch.where(whole[:, None], p, residual(p, rejected_q))
    stream = torch.where(whole, int(Stream.CHOICE), int(Stream.RESIDUAL))
    return accepted, sample(p.log(), seeds, positions + accepted, stream=stream)
