"""What history does to logits: bias, penalties, bad words, minimum new tokens.

Meanings and order are those of transformers' logits processors: sequence bias, repetition
penalty, bad words, minimum new tokens. Presence and frequency penalties, which transformers
lacks, follow the OpenAI formula and come right after the repetition penalty::

    logit[v] -= frequency * count(v in output) + presence * (v in output)

Output means positions from ``prompt_len`` on; repetition counts the prompt too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from outrider.shared.core.types import Decoding


@dataclass(frozen=True, slots=True)
class RowContext:
    """One row of logits: how its token is chosen and what comes before it.

    The row's tokens are ``history + tail``, prompt included. Rows of one sequence share the
    ``history`` object (the committed log) and differ in ``tail``, the tokens proposed before
    them in the same round, so that a history is read once however many rows it has.
    """

    decoding: Decoding
    history: Sequence[int]
    tail: Sequence[int] = ()

    @property
    def position(self) -> int:
        """Index in the sequence of the token this row chooses."""
        return len(self.history) + len(self.tail)


def is_penalised(d: Decoding) -> bool:
    """Whether anything in this module applies to ``d``."""
    return (
        d.repetition_penalty != 1.0
        or d.presence_penalty != 0.0
        or d.frequency_penalty != 0.0
        or bool(d.logit_bias)
        or may_forbid_all(d)
        or d.vocab_size > 0
    )


def may_forbid_all(d: Decoding) -> bool:
    """Whether ``d`` can leave a row without a token to choose."""
    return bool(d.bad_words) or (d.min_new_tokens > 0 and bool(d.eos_token_ids))


def apply_penalties(scores: Tensor, rows: Sequence[RowContext]) -> Tensor:
    """Logits [rows, vocab] float32 with every penalty of each row applied; a new tensor.

    Rows that ask for nothing come back bit for bit as they were, and no row depends on
    another. Token ids outside the vocabulary are ignored.
    """
    scores = scores.clone()
    _add_bias(scores, rows)
    decodings = [row.decoding for row in rows]
    if any(d.repetition_penalty != 1.0 for d in decodings):
        seen = _counts(scores, rows, whole=True) > 0
        penalty = _column([d.repetition_penalty for d in decodings], scores)
        scores = torch.where(
            seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores
        )
    if any(d.presence_penalty != 0.0 or d.frequency_penalty != 0.0 for d in decodings):
        count = _counts(scores, rows, whole=False)
        frequency = _column([d.frequency_penalty for d in decodings], scores)
        presence = _column([d.presence_penalty for d in decodings], scores)
        scores = scores - (frequency * count + presence * (count > 0))
    _forbid(scores, rows)
    return scores


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _add_bias(scores: Tensor, rows: Sequence[RowContext]) -> None:
    """In place: adds each row's logit bias."""
    vocab_size = scores.shape[-1]
    entries = [
        (i, token, value)
        for i, row in enumerate(rows)
        for token, value in row.decoding.logit_bias
        if token < vocab_size
    ]
    if entries:
        at, tokens, values = zip(*entries, strict=True)
        index = torch.tensor([at, tokens], device=scores.device)
        bias = torch.tensor(values, dtype=torch.float32, device=scores.device)
        scores.index_put_((index[0], index[1]), bias, accumulate=True)


def _forbid(scores: Tensor, rows: Sequence[RowContext]) -> None:
    """In place: -inf where a bad word would be completed, the end comes too early, or the base
    has no such token."""
    vocab_size = scores.shape[-1]
    at: list[int] = []
    tokens: list[int] = []
    for i, row in enumerate(rows):
        for token in forbidden_tokens(row):
            if token < vocab_size:
                at.append(i)
                tokens.append(token)
        if row.decoding.vocab_size:
            scores[i, row.decoding.vocab_size :] = -math.inf
    if at:
        index = torch.tensor([at, tokens], device=scores.device)
        scores[index[0], index[1]] = -math.inf


def forbidden_tokens(row: RowContext) -> set[int]:
    """The token ids that may not be chosen at this row.

    A bad word that ends the text is forbidden like any other; transformers lets those pass that
    are just an end-of-sequence token.
    """
    d = row.decoding
    forbidden: set[int] = set()
    for word in d.bad_words:
        if _ends_with(row, word[:-1]):
            forbidden.add(word[-1])
    if row.position - d.prompt_len < d.min_new_tokens:
        forbidden.update(d.eos_token_ids)
    return forbidden


def _ends_with(row: RowContext, prefix: tuple[int, ...]) -> bool:
    """Whether the row's tokens end with ``prefix``."""
    n = len(prefix)
    if n > row.position:
        return False
    tail = tuple(row.tail[-n:]) if n else ()
    missing = n - len(tail)
    start = len(row.history) - missing
    return tail == prefix[missing:] and tuple(row.history[start:]) == prefix[:missing]


def _counts(scores: Tensor, rows: Sequence[RowContext], *, whole: bool) -> Tensor:
    """How often each token occurs before each row: int32 [rows, vocab].

    ``whole`` counts the prompt too. Histories shared by several rows are counted once.
    """
    vocab_size = scores.shape[-1]
    slots: dict[tuple[int, int], int] = {}
    slot_of_row: list[int] = []
    # Pairs (slot or row, token) to count, for histories and for tails.
    shared: tuple[list[int], list[int]] = ([], [])
    own: tuple[list[int], list[int]] = ([], [])
    for i, row in enumerate(rows):
        skip = 0 if whole else row.decoding.prompt_len
        key = (id(row.history), skip)
        if key not in slots:
            slots[key] = len(slots)
            tokens = row.history[skip:]
            shared[0].extend([slots[key]] * len(tokens))
            shared[1].extend(tokens)
        slot_of_row.append(slots[key])
        tail = row.tail[max(0, skip - len(row.history)) :]
        own[0].extend([i] * len(tail))
        own[1].extend(tail)

    def count(size: int, pairs: tuple[list[int], list[int]]) -> Tensor:
        # One column more takes in ids outside the vocabulary.
        columns = vocab_size + 1
        at, tokens = np.array(pairs, dtype=np.int64)
        index = torch.from_numpy(at * columns + tokens.clip(max=vocab_size)).to(scores.device)
        table = torch.zeros(size * columns, dtype=torch.int32, device=scores.device)
        one = torch.ones((), dtype=torch.int32, device=scores.device)
        return table.scatter_add_(0, index, one.expand(len(index))).view(size, columns)

    table = count(len(slots), shared)[slot_of_row]
    if own[0]:
        table += count(len(rows), own)
    return table[:, :vocab_size]
