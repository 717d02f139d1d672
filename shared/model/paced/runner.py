"""A runner that takes the time it is told: what is studied is all that is around the models.

There are no weights. The base's token is a hash of its position and of the tokens before it, as
they stand in the arena: the wrong token, lost or rolled back wrongly, shows in the text. A draft
says the same with the chance that its spec has, by a hash of its own, and else another token. So
texts and acceptance are the same in every run, on every machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from outrider.shared.core.model_facts import ModelFacts
from outrider.shared.core.types import Decoding, SparseRow
from outrider.shared.kv.arena import Extent
from outrider.shared.kv.storage import LayerKind, Storage
from outrider.shared.model.paced.spec import PacedSpec
from outrider.shared.model.runner import Runner, Span
from outrider.shared.sampling.choose import takes_likeliest

Ids = NDArray[np.int64]
TAIL = 3
"""Tokens before a position that its token depends on."""
KIND = LayerKind(kv_heads=1, key_dim=1, value_dim=1)
"""Of the one layer: the key of a position is its token."""
CERTAIN = 100.0
"""Logit of the one token that can follow; all others have 0."""
SPIN_SECONDS = 2e-4
"""Watched before a forward's end: whoever sleeps wakes late."""
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_SHIFTS = (np.uint64(30), np.uint64(27))
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


class PacedRunner(Runner):
    """Chooses tokens without a model, and takes as long as its spec says."""

    def __init__(
        self,
        spec: PacedSpec,
        facts: ModelFacts,
        storage: Storage,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """``storage``: of one layer of ``KIND``."""
        super().__init__(facts, storage)
        self._spec, self._clock, self._sleep = spec, clock, sleep
        self._tokens = storage.layer_keys[0].numpy()[:, 0, 0]
        self._shares = np.array(spec.agreement)

    @property
    def cores(self) -> int:
        """See ``Runner.cores``: it sleeps."""
        return 0

    def _forward(self, spans: Sequence[Span]) -> Tensor:
        until = self._clock() + self._seconds(spans)
        chosen = self._chosen(spans)
        logits = torch.zeros(len(chosen), self._spec.vocab)
        logits[torch.arange(len(chosen)), torch.from_numpy(chosen)] = CERTAIN
        self._wait(until)
        return logits

    def judge(
        self,
        spans: Sequence[Span],
        decodings: Sequence[Decoding],
        proposals: Sequence[Sequence[int]],
        rows: Sequence[Sequence[SparseRow]] | None = None,
    ) -> list[tuple[int, int]] | None:
        """See ``Runner.judge``: where every sequence takes the likeliest token."""
        if not all(map(takes_likeliest, decodings)):
            return None
        self.check(spans)
        until = self._clock() + self._seconds(spans)
        with self._writing(spans):
            chosen = iter(self._chosen(spans).tolist())
        verdicts: list[tuple[int, int]] = []
        for span, proposal in zip(spans, proposals, strict=True):
            own = [next(chosen) for _ in range(span.wanted)]
            if own:
                wrong = (i for i, token in enumerate(proposal) if token != own[i])
                accepted = next(wrong, len(proposal))
                verdicts.append((accepted, own[accepted]))
        self._wait(until)
        return verdicts

    def propose(
        self, spans: Sequence[Span], decodings: Sequence[Decoding], ks: Sequence[int]
    ) -> list[list[int]] | None:
        """See ``Runner.propose``: where every sequence takes the likeliest token."""
        if not all(map(takes_likeliest, decodings)):
            return None
        until = self._clock()
        answers: list[list[int]] = [[] for _ in spans]
        left = list(enumerate(spans))
        while left:
            spans = [span for _, span in left]
            self.check(spans)
            until += self._seconds(spans)
            with self._writing(spans):
                chosen = iter(self._chosen(spans).tolist())
            for i, span in left:
                answers[i] += [next(chosen) for _ in range(span.wanted)]
            left = [
                (i, Span(span.extent, span.end, answers[i][-1:], 1))
                for i, span in left
                if len(answers[i]) < ks[i]
            ]
        self._wait(until)
        return answers

    def _seconds(self, spans: Sequence[Span]) -> float:
        return self._spec.seconds(sum(len(span.tokens) for span in spans))

    def _wait(self, until: float) -> None:
        left = until - SPIN_SECONDS - self._clock()
        if left > 0:
            self._sleep(left)
        while self._clock() < until:
            pass

    def _chosen(self, spans: Sequence[Span]) -> Ids:
        """Writes the rows; returns what follows the wanted ones."""
        rows = np.array([len(span.tokens) for span in spans])
        wanted = np.array([span.wanted for span in spans])
        ends = np.array([span.end for span in spans])
        places = np.array([_place(span.extent) for span in spans])
        self._tokens[_slots(_last(rows, ends), np.repeat(places, rows, 0))] = [
            token for span in spans for token in span.tokens
        ]
        places = np.repeat(places, wanted, 0)
        positions = _last(wanted, ends)
        # Before the first token stands the first one again.
        tails = [
            self._tokens[_slots(np.maximum(positions - back, 0), places)] for back in range(TAIL)
        ]
        first = self._tokens[_slots(np.zeros_like(positions), places)].astype(np.int64)
        return self._following([positions, *tails], self._shares[first % len(self._shares)])

    def _following(self, words: Sequence[NDArray[Any]], shares: NDArray[np.float64]) -> Ids:
        """What follows where ``words`` are the place and the tokens before."""
        vocab = np.uint64(self._spec.vocab)
        mixed = np.full(len(words[0]), self._spec.seed, np.uint64)
        for word in words:
            mixed = _mixed(mixed + word.astype(np.int64).view(np.uint64) + _INCREMENT)
        own = mixed % vocab
        chance = (mixed >> np.uint64(11)) * 2.0**-53
        other = _mixed(mixed + _INCREMENT) % (vocab - np.uint64(1))
        wrong = (own + other + np.uint64(1)) % vocab
        return np.where(chance < shares, own, wrong).astype(np.int64)


def _place(extent: Extent) -> tuple[int, int, int]:
    """How many positions are the parent's, and the slots of position 0 there and here."""
    prefix, parent = extent.prefix_len, extent.parent
    return prefix, 0 if parent is None else parent.start, extent.start - prefix


def _last(counts: Ids, ends: Ids) -> Ids:
    """The last positions before ``ends``, so many for each of them, in order."""
    begins = np.cumsum(counts) - counts
    return np.arange(counts.sum()) - np.repeat(begins - ends + counts, counts)


def _slots(positions: Ids, places: Ids) -> Ids:
    """Where they live, by ``_place`` of each."""
    prefix, parent, own = places.T
    slots: Ids = positions + np.where(positions < prefix, parent, own)
    return slots


def _mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The last steps of splitmix64."""
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=True):
        numbers = (numbers ^ (numbers >> shift)) * factor
    return numbers ^ (numbers >> np.uint64(31))
