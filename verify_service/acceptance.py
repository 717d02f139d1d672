"""Verdicts: what stands of a proposal, and the base's own token after it.

How a proposal is judged is up to its rule (``shared/core/rules.py``): each has a judge in
``verify_service/rules``. Randomness is counter-based throughout: the same seed and proposals
give the same verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TypeAlias

import torch
from torch import Tensor

from outrider.shared.core.rules import GREEDY
from outrider.shared.core.types import Decoding, PositionLogprobs, SparseRow
from outrider.shared.sampling.choose import RowContext, process


@dataclass(frozen=True, slots=True)
class JudgeItem:
    """One proposal: ``history`` is the committed log, ``rows`` the draft's distributions.

    ``rows`` matters to rules that need rows only. Without it a proposed token counts as certain
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


@dataclass(frozen=True, slots=True)
class JudgeBatch:
    """Proposals and what the base says of them.

    ``processed``: processed logits [rows, vocab], a row for each of ``contexts``; those of item
    i begin at ``first[i]``, that of its pending token, and one for each proposed token follows.
    """

    items: Sequence[JudgeItem]
    first: Sequence[int]
    contexts: Sequence[RowContext]
    processed: Tensor


Judge: TypeAlias = Callable[[JudgeBatch, Sequence[int]], list[tuple[int, int]]]
"""Judges some items of a batch, given by index: for each, how many of its proposed tokens stand,
and the token that follows them. An outcome does not depend on the other items."""


def judge(logits: Tensor, items: Sequence[JudgeItem]) -> list[Judged]:
    """Judges a ragged batch of proposals, each by its rule.

    ``logits``: the base's raw logits [sum(len(proposal) + 1), vocab], item after item: the
    row of the pending token, then that of each proposed token. An empty proposal is plain
    decoding. An item's outcome does not depend on the others.
    """
    contexts: list[RowContext] = []
    first: list[int] = []
    by_judge: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        first.append(len(contexts))
        contexts.extend(
            RowContext(item.decoding, item.history, item.proposal[:n])
            for n in range(len(item.proposal) + 1)
        )
        # Without a proposal there is nothing to judge: the base just chooses.
        name = item.decoding.rule.judge if item.proposal else GREEDY.judge
        by_judge.setdefault(name, []).append(i)
    batch = JudgeBatch(items, first, contexts, process(logits, contexts))
    verdicts: list[tuple[int, int]] = [(0, 0)] * len(items)
    for name, mine in by_judge.items():
        for i, verdict in zip(mine, judge_named(name)(batch, mine), strict=True):
            verdicts[i] = verdict
    logprobs = _logprobs(batch, verdicts)
    return [Judged(a, token, lp) for (a, token), lp in zip(verdicts, logprobs, strict=True)]


@cache
def judge_named(name: str) -> Judge:
    """The function ``judge`` of that file in ``verify_service/rules``."""
    found: Judge = import_module(f"outrider.verify_service.rules.{name}").judge
    return found


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


def _logprobs(
    batch: JudgeBatch, verdicts: Sequence[tuple[int, int]]
) -> list[tuple[PositionLogprobs, ...]]:
    """Log-probabilities of what each item emits, from the processed distribution.

    log_softmax of the processed logits: at temperature > 0 after every warper, at
    temperature 0 after penalties, bias and bans. Tokens that were dropped have
    probability 0 and are left out of the likeliest ones.
    """
    items, first, processed = batch.items, batch.first, batch.processed
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
