"""The acceptance rules: what stands of a proposal, and the base's own token after it.

``greedy`` and ``coupled`` compare: a proposed token stands iff it *equals* the token that
the base itself chooses there, so the output is the base's own whatever was proposed.
``rejection`` (Leviathan et al. 2023; Chen et al. 2023) accepts ``d ~ q`` with probability
``min(1, p(d)/q(d))`` and otherwise draws from the normalised positive part of ``p - q``, so
the output has the law of the base, at the highest acceptance there is.

Randomness is counter-based throughout: the same seed and proposals give the same verdict.
At temperature 0 all three are the same rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.shared.core.types import Decoding, PositionLogprobs, Rule, SparseRow
from outrider.shared.sampling.choose import RowContext, choose, process, sample
from outrider.shared.sampling.noise import Stream, seed_tensor, uniform


@dataclass(frozen=True, slots=True)
class JudgeItem:
    """One proposal: ``history`` is the committed log, ``rows`` the draft's distributions.

    ``rows`` matters to ``rejection`` only. Without it a proposed token counts as certain
    (q = 1 there), which is right for any proposal, just less often accepted.
    """

    decoding: Decoding
    history: Sequence[int]
    proposal: Sequence[int] = ()
    rows: Sequence[SparseRow] = ()


@dataclass(frozen=True, slots=True)
class Judged:
    """The first ``num_accepted`` proposed tokens stand; ``next_token`` follows them.

    ``logprobs`` has ``num_accepted + 1`` entries if the decoding asks for them, else none.
    """

    num_accepted: int
    next_token: int
    logprobs: tuple[PositionLogprobs, ...] = ()


def judge(logits: Tensor, items: Sequence[JudgeItem]) -> list[Judged]:
    """Judges a ragged batch of proposals.

    ``logits``: the base's raw logits [sum(len(proposal) + 1), vocab], item after item: the
    row of the pending token, then that of each proposed token. An empty proposal is plain
    decoding. An item's outcome does not depend on the others.
    """
    contexts: list[RowContext] = []
    first: list[int] = []
    for item in items:
        first.append(len(contexts))
        contexts.extend(
            RowContext(item.decoding, item.history, item.proposal[:i])
            for i in range(len(item.proposal) + 1)
        )
    processed = process(logits, contexts)

    verdicts: list[tuple[int, int]] = [(0, 0)] * len(items)
    rejection = [i for i, item in enumerate(items) if _draws(item)]
    if len(rejection) < len(items):
        targets = choose(processed, contexts)
        for i, item in enumerate(items):
            own = targets[first[i] : first[i] + len(item.proposal) + 1]
            accepted = accepted_prefix(own, item.proposal)
            verdicts[i] = accepted, own[accepted]
    if rejection:
        drawn = [items[i] for i in rejection]
        for i, verdict in zip(
            rejection, _judge_drawn(processed, drawn, [first[i] for i in rejection]), strict=True
        ):
            verdicts[i] = verdict
    logprobs = _logprobs(processed, items, first, verdicts)
    return [Judged(a, token, lp) for (a, token), lp in zip(verdicts, logprobs, strict=True)]


def accepted_prefix(targets: Sequence[int], proposal: Sequence[int]) -> int:
    """``greedy`` and ``coupled``: how many proposed tokens equal the base's own choices."""
    for i, token in enumerate(proposal):
        if token != targets[i]:
            return i
    return len(proposal)


def accepted_draws(p_at: Tensor, q_at: Tensor, uniforms: Tensor, lengths: Tensor) -> Tensor:
    """``rejection``: how many proposed tokens pass ``u < p/q``, up to the first that fails.

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
    """The ``rejection`` rule for a batch of items; returns (accepted, next token), [items].

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


def malformed(proposal: Sequence[int], rows: Sequence[SparseRow], vocab_size: int) -> str | None:
    """What is wrong with a proposal and its distributions, or None. ``judge`` relies on it."""
    if any(not 0 <= token < vocab_size for token in proposal):
        return f"proposal: token ids must be in [0, {vocab_size})"
    if rows and len(rows) != len(proposal):
        return f"rows: got {len(rows)}; must be none or one for each of {len(proposal)} tokens"
    for token, row in zip(proposal, rows, strict=False):
        if len(row.ids) != len(row.probabilities):
            return "rows: each id goes with one probability"
        offered = dict(zip(row.ids, row.probabilities, strict=True))
        if len(offered) != len(row.ids):
            return "rows: ids must be distinct"
        if any(not 0 <= i < vocab_size for i in row.ids):
            return f"rows: ids must be in [0, {vocab_size})"
        if any(not 0 <= p <= 1.001 for p in row.probabilities):
            return "rows: probabilities must be in [0, 1]"
        if not math.isclose(math.fsum(row.probabilities), 1.0, abs_tol=1e-3):
            return "rows: probabilities must sum to 1"
        if offered.get(token, 0.0) <= 0:
            return f"rows: token {token} was proposed with probability 0"
    return None


def _draws(item: JudgeItem) -> bool:
    # Without a proposal there is nothing to reject: the base just chooses.
    return (
        bool(item.proposal)
        and item.decoding.rule == Rule.REJECTION
        and item.decoding.temperature > 0
    )


def _judge_drawn(
    processed: Tensor, items: Sequence[JudgeItem], first: Sequence[int]
) -> list[tuple[int, int]]:
    """Pads ``items`` into tensors for ``judge_rejection``; one transfer back."""
    device = processed.device
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
        processed,
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


def _logprobs(
    processed: Tensor,
    items: Sequence[JudgeItem],
    first: Sequence[int],
    verdicts: Sequence[tuple[int, int]],
) -> list[tuple[PositionLogprobs, ...]]:
    """Log-probabilities of what each item emits, from the processed distribution.

    log_softmax of the processed logits: at temperature > 0 after every warper, at
    temperature 0 after penalties, bias and bans. Tokens that were dropped have
    probability 0 and are left out of the likeliest ones.
    """
    wanted = [i for i, item in enumerate(items) if item.decoding.logprobs is not None]
    if not wanted:
        return [()] * len(items)
    at: list[int] = []
    tokens: list[int] = []
    for i in wanted:
        accepted, token = verdicts[i]
        at.extend(range(first[i], first[i] + accepted + 1))
        tokens.extend((*items[i].proposal[:accepted], token))
    index = torch.tensor([at, tokens], device=processed.device)
    logprobs = processed[index[0]].log_softmax(-1)
    chosen = logprobs.gather(1, index[1][:, None]).squeeze(1).tolist()
    most = min(max(items[i].decoding.logprobs or 0 for i in wanted), processed.shape[-1])
    best = logprobs.topk(most)
    best_values, best_ids = best.values.tolist(), best.indices.tolist()

    answers: list[tuple[PositionLogprobs, ...]] = [()] * len(items)
    start = 0
    for i in wanted:
        end = start + verdicts[i][0] + 1
        n = items[i].decoding.logprobs or 0
        answers[i] = tuple(
            PositionLogprobs(
                chosen[j],
                tuple(
                    (token, value)
                    for token, value in zip(best_ids[j][:n], best_values[j][:n], strict=True)
                    if value > -math.inf
                ),
            )
            for j in range(start, end)
        )
        start = end
    return answers
