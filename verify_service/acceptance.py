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
from outrider.shared.sampling.choose import RowContext, dead_rows, penalise
from outrider.shared.sampling.warpers import warp


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


def judge(
    logits: Tensor, items: Sequence[JudgeItem], finite: Sequence[bool] = ()
) -> list[Judged | None]:
    """Judges a ragged batch of proposals, each by its rule.

    ``logits``: the base's raw logits [sum(len(proposal) + 1), vocab], item after item: the
    row of the pending token, then that of each proposed token. An empty proposal is plain
    decoding. ``finite``: for each row whether its numbers say anything; all do by default. An
    item's outcome does not depend on the others, nor on rows behind what it accepts. None where
    no token can follow the log, since all are forbidden, or its row says nothing.
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
    scores = penalise(logits, contexts)
    batch = JudgeBatch(items, first, contexts, warp(scores, [row.decoding for row in contexts]))
    verdicts: list[tuple[int, int]] = [(0, 0)] * len(items)
    for name, mine in by_judge.items():
        for i, verdict in zip(mine, judge_named(name)(batch, mine), strict=True):
            verdicts[i] = verdict
    stuck = _step_back(batch, verdicts, finite)
    logprobs = _logprobs(batch, scores, verdicts)
    return [
        None if i in stuck else Judged(*verdict, logprobs[i]) for i, verdict in enumerate(verdicts)
    ]


@cache
def judge_named(name: str) -> Judge:
    """The function ``judge`` of that file in ``verify_service/rules``."""
    found: Judge = import_module(f"outrider.verify_service.rules.{name}").judge
    return found


def _step_back(
    batch: JudgeBatch, verdicts: list[tuple[int, int]], finite: Sequence[bool]
) -> set[int]:
    """Ends verdicts before a row where nothing can be chosen; returns the items that begin there.

    What was accepted before such a row stands, its last token being the one that follows the
    others: so the text comes as far as token by token, and the next round begins at that row.
    """
    stuck: set[int] = set()
    dead = dead_rows(batch.processed, batch.contexts)
    if not all(finite):
        dead = sorted({*dead, *(row for row, fine in enumerate(finite) if not fine)})
    if not dead:
        return stuck
    for i, item in enumerate(batch.items):
        first, (accepted, _) = batch.first[i], verdicts[i]
        at = next((row - first for row in dead if first <= row <= first + accepted), None)
        if at == 0:
            verdicts[i] = (0, 0)
            stuck.add(i)
        elif at is not None:
            verdicts[i] = (at - 1, item.proposal[at - 1])
    return stuck


def _logprobs(
    batch: JudgeBatch, scores: Tensor, verdicts: Sequence[tuple[int, int]]
) -> list[tuple[PositionLogprobs, ...]]:
    """Log-probabilities of what each item emits, from the processed distribution.

    log_softmax of the processed logits: at temperature > 0 after every warper, at
    temperature 0 after penalties, bias and bans. Tokens that were dropped have
    probability 0 and are left out of the likeliest ones. ``scores``: the logits before the
    warpers, which are divided by the temperature anew, in float64: a small temperature enlarges
    what float32 rounds.
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
    logprobs = _exactly(
        scores[index[0]],
        processed[index[0]] == -math.inf,
        [batch.contexts[row].decoding.temperature or 1.0 for row in at],
    )
    index = index.to(logprobs.device)
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


def _exactly(scores: Tensor, dropped: Tensor, temperatures: Sequence[float]) -> Tensor:
    """log_softmax of ``scores / temperatures`` without the ``dropped``, float64 [rows, vocab]."""
    if scores.device.type == "mps":  # has no float64
        scores, dropped = scores.cpu(), dropped.cpu()
    heat = torch.tensor(temperatures, dtype=torch.float64, device=scores.device)[:, None]
    return scores.double().div_(heat).masked_fill_(dropped, -math.inf).log_softmax(-1)
