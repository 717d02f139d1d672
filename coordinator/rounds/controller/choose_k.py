"""How many tokens the draft proposes for each sequence of a round. Pure Python, deterministic.

A request may fix its K. For the others the controller takes the Ks with the most tokens a second
(``batch``), by the times measured at the start, corrected by what rounds really took (``costs``).
K = 0 for all skips the draft and is a candidate like any other.

Where speculation does not pay it is tried again from time to time, with some of the sequences,
for acceptance moves with the text: as often as a hundredth of the time allows, and not at all
where by the costs even the best acceptance would not pay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from outrider.coordinator.requests.acceptance_rate import Acceptance, Everyone, survival
from outrider.coordinator.rounds.controller.batch import GRAIN, Speculable, SpeculableBatch, clipped
from outrider.coordinator.rounds.controller.costs import Costs

HOLD = 8
"""Rounds between decisions, at most, while the batch stays the same."""
HOLD_PLAIN = 32
"""The same where nothing is drafted, and so nothing learnt."""
MARGIN = 1.01
"""A change of Ks must promise this much."""
PAYS = 1.03
"""What speculation must promise in a batch, beside plain decoding: with it sequences that began
together end apart, and the last ones run with few beside them."""
CLEARLY = 1.2
"""Beyond this speculation pays, whatever may be wrong with the costs of rounds without it."""
PLAIN_ROUNDS = 3
"""Rounds that show what those cost."""
PROBE_SEQUENCES = 8
"""Sequences that are probed, at most: with few, it takes more rounds to learn as much."""
PROBE_ROUNDS = 4
"""Rounds of a probe, at most."""
PROBE_ROUNDS_BESIDE = 4
"""Rounds that a probe costs besides: the draft has to come near to the texts first."""
PROBE_SHARE = 0.005
"""Share of the time that probes may cost while speculation does not pay."""
PROBE_SOON, PROBE_LATE = 32, 4096
"""Least and most rounds between probes."""
OPTIMISM = 0.6
"""Standard deviations by which acceptance may be underestimated when speculation is given up."""
LEAST = 0.85
"""What it must promise then without that, beside plain decoding."""
HOPE = 0.95
"""The acceptance that must pay for a probe to be worth its time."""


@dataclass(frozen=True, slots=True)
class ChosenKs:
    """Ks for one batch, and what they promise."""

    ks: tuple[int, ...]
    rate: float
    """Tokens a second of all sequences together."""
    plain: float
    """The same at K = 0."""
    why: str


@dataclass(frozen=True, slots=True)
class Outlook:
    """What one K for all of a batch promises."""

    k: int
    draft_seconds: float
    rest_seconds: float
    rate: float
    """Tokens a second of all sequences together."""


class Speculation:
    """Chooses K, and learns from what the rounds did."""

    def __init__(self, max_k: int) -> None:
        """``max_k``: the largest K that both services allow."""
        self.limit = max_k
        """The configured largest K."""
        self.max_k = max_k
        """The largest K that the services allow now."""
        self.together = False
        """Whether a batch is drafted for as a whole: each sequence has a K above 0, or none has."""
        self.everyone = Everyone()
        self.costs = Costs()
        self.choice = ChosenKs((), 0.0, 0.0, "has not run")
        """The choice in force."""
        self._round = 0
        self._who: list[Acceptance] = []
        self._decide_at = 0
        self._hold = 1
        self._drafted: set[int] = set()
        """Those that have a K above 0, by the identity of their ``Acceptance``."""
        self._settled: set[int] = set()
        """Those that the choice in force is about."""
        self._probe_at = 0

    @property
    def k(self) -> int:
        """The largest K in force for sequences that leave it to the server."""
        return max(self.choice.ks, default=0)

    def wanted(self, fixed: int | None, acceptance: Acceptance) -> bool:
        """Whether the draft is of use now or soon to a sequence with this K of its own."""
        if fixed is not None:
            return fixed > 0
        key = id(acceptance)
        if key in self._settled:
            return key in self._drafted
        return self.k > 0 or self._unknown

    def choose(self, sequences: Sequence[Speculable]) -> list[int]:
        """K for each sequence of the next round."""
        self._round += 1
        adaptive = [i for i, one in enumerate(sequences) if one.fixed is None and one.limit > 0]
        if not adaptive or self.max_k < 1:
            return clipped(sequences, (0,) * len(sequences), self.max_k)
        who = [one.acceptance for one in sequences]
        if who != self._who or self._round >= self._decide_at:
            self._decide(sequences, adaptive, who)
        return clipped(sequences, self.choice.ks, self.max_k)

    def outlook(self) -> list[Outlook]:
        """K = 0, 1, … for a batch of the size that ran last, with what all sequences show."""
        count = len(self.choice.ks)
        if not count:
            return []
        draft, rest = self.costs.factors(count, self.max_k)
        chances = survival(self.everyone.rate, self.everyone.shape(self.max_k))
        made, tokens = [], 1.0
        for k in range(self.max_k + 1):
            tokens += chances[k - 1] if k else 0.0
            drafting = draft[k] * self.costs.draft_seconds(count, k)
            others = rest[k] * self.costs.rest_seconds(count, count * (k + 1))
            seconds = drafting + others
            made.append(Outlook(k, drafting, others, count * tokens / seconds if seconds else 0.0))
        return made

    def observe(
        self, batch: int, drafted: int, k: int, rows: int, draft: float, rest: float
    ) -> None:
        """What a round of ``batch`` decoding sequences took: the draft ``draft`` seconds to propose
        up to ``k`` tokens for ``drafted`` of them, everything else ``rest``.

        Rounds that also took in prompts must not be told: they would make decoding look slow.
        """
        self.costs.observe(batch, drafted, k, rows, draft, rest)

    # --- the choice --------------------------------------------------------------------------

    @property
    def _unknown(self) -> bool:
        """Whether nothing was drafted yet."""
        return self.everyone.seen == 0

    def _decide(
        self, sequences: Sequence[Speculable], adaptive: list[int], who: list[Acceptance]
    ) -> None:
        """Chooses anew, for a while."""
        same = who == self._who
        most = HOLD if self.k else HOLD_PLAIN
        self._hold = min(most, 2 * self._hold) if same else 1
        self._decide_at = self._round + self._hold
        self._who = who
        batch = self._batch(sequences, adaptive)
        plain = batch.plain()
        ks, rate = batch.best()
        if same and self.choice.ks and ks != self.choice.ks:
            now = batch.rate(self.choice.ks)
            if rate < MARGIN * now and now >= plain:
                ks, rate = self.choice.ks, now
        why = "pays"
        if rate <= plain * (PAYS if len(sequences) > 1 else 1.0):
            ks, rate, why = self._unsure(sequences, adaptive, batch, plain)
        if not any(ks) and self._probes(sequences, adaptive, batch, plain):
            return
        if plain < rate < CLEARLY * plain and not self.costs.knows_plain(len(sequences)):
            # Rounds without a draft run in another way than those timed at the start, and to
            # know how much faster costs next to nothing where the two are close.
            self._put(ChosenKs(batch.nothing, plain, plain, "is compared with none"), who)
            self._decide_at = self._round + PLAIN_ROUNDS
            self._drafted = set(self._settled)  # the draft takes in what it lacks meanwhile
            return
        self._put(ChosenKs(ks, rate, plain, why), who)

    def _unsure(
        self,
        sequences: Sequence[Speculable],
        adaptive: Sequence[int],
        batch: SpeculableBatch,
        plain: float,
    ) -> tuple[tuple[int, ...], float, str]:
        """What to do where speculation seems not to pay: go on while that may be bad luck."""
        tries = sum(sequences[i].acceptance.tries for i in adaptive)
        rate = self.everyone.rate
        error = OPTIMISM * math.sqrt(rate * (1 - rate) / (1 + tries))
        if error * GRAIN < 1:
            return batch.nothing, plain, "does not pay"
        ks, hoped = self._batch(sequences, adaptive, error=error).best()
        rate = batch.rate(ks)
        if hoped > plain and rate >= LEAST * plain:
            return ks, rate, "may pay"
        return batch.nothing, plain, "does not pay"

    def _put(self, choice: ChosenKs, who: list[Acceptance]) -> None:
        self.choice = choice
        self._settled = {id(one) for one in who}
        self._drafted = {id(one) for one, k in zip(who, choice.ks, strict=True) if k}

    def _batch(
        self,
        sequences: Sequence[Speculable],
        adaptive: Sequence[int],
        *,
        error: float = 0.0,
        hope: float | None = None,
    ) -> SpeculableBatch:
        return SpeculableBatch(
            sequences, adaptive, self.max_k, self.costs, self.everyone,
            together=self.together, error=error, hope=hope,
        )  # fmt: skip

    # --- trying again ------------------------------------------------------------------------

    def _probes(
        self,
        sequences: Sequence[Speculable],
        adaptive: Sequence[int],
        batch: SpeculableBatch,
        plain: float,
    ) -> bool:
        """Begins a probe where it is time for one; whether it did."""
        if not self._probe_at:
            self._probe_at = self._round + PROBE_SOON
        # Where nothing is known there is no waiting: a probe that other sequences' coming cut
        # short has shown nothing.
        if self._round < self._probe_at and not self._unknown:
            return False
        _, hoped = self._batch(sequences, adaptive, hope=HOPE).best()
        if hoped <= MARGIN * plain:
            self._probe_at = self._round + PROBE_LATE
            return False
        # Those whose estimate rests on least.
        order = sorted(adaptive, key=lambda i: sequences[i].acceptance.tries)
        probed = order[:PROBE_SEQUENCES]
        ks = [0] * len(sequences)
        for i in probed:
            ks[i] = 1
        rounds = min(PROBE_ROUNDS, -(-PROBE_SEQUENCES // len(probed)))
        rate = batch.rate(ks)
        # A probing round writes rate * its time; plain decoding would have done so in less.
        lost = max(0.0, 1 - rate / plain) if plain > 0 else 0.0
        gap = int((rounds * lost + PROBE_ROUNDS_BESIDE) / PROBE_SHARE)
        self._probe_at = self._round + min(max(gap, PROBE_SOON), PROBE_LATE)
        self._decide_at = self._round + rounds
        self._hold = 1
        self._put(ChosenKs(tuple(ks), rate, plain, "is probed"), self._who)
        return True
