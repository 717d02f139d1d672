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
from outrider.shared.core.links import turns_ahead

HOLD = 8
"""Rounds between decisions, at most, while the batch stays the same."""
HOLD_PLAIN = 32
"""The same where nothing is drafted, and so nothing learnt."""
MARGIN = 1.01
"""A change of Ks must promise this much, beside what the change itself costs."""
HORIZON = 32
"""Rounds without a draft that a choice is expected to be in force for, or as many as the texts
have left: what it costs to change is shared out among them."""
PAYS = 1.03
"""What speculation must promise in a batch to begin, beside plain decoding: with it sequences that
began together end apart, and the last ones run with few beside them."""
CLEARLY = 1.2
"""Beyond this speculation pays, whatever may be wrong with the costs of rounds without it."""
PLAIN_ROUNDS = 3
"""Rounds that show what those cost."""
PROBE_SEQUENCES = 8
"""Sequences that are probed, at most, where that is free to choose: with few, it takes more rounds
to learn as much."""
PROBE_ROUNDS = 4
"""Rounds of a probe, at most."""
PROBE_WAIT = 32
"""Rounds that a probe may take to begin."""
WORTHWHILE = 1.02
"""What acceptance by a standard deviation better must promise for another probe soon after."""
PROBE_SHARE = 0.005
"""Share of the time that probes may cost while speculation does not pay."""
PROBE_SOON, PROBE_LATE = 32, 4096
"""Least and most rounds between probes, and before the first one."""
ENOUGH = 4
"""Verdicts without which speculation is not given up."""
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
        self._probe_seen = -1
        """Verdicts that there were when the probe that runs began; -1: none runs."""

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
        if who != self._who or not self._holds(sequences, adaptive):
            self._decide(sequences, adaptive, who)
        if self._waits(sequences, adaptive):
            self._decide_at += 1
            return clipped(sequences, (0,) * len(sequences), self.max_k)
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

    def observe_change(self, batch: int, drafted: int, k: int, rows: int, seconds: float) -> None:
        """A round as in ``observe``, the first after a change of what the services run by
        themselves, was over ``seconds`` after the one before it."""
        self.costs.observe_change(batch, drafted, k, rows, seconds)

    def observe(
        self, batch: int, drafted: int, k: int, rows: int, draft: float, rest: float
    ) -> None:
        """What a round of ``batch`` decoding sequences took: the draft ``draft`` seconds to propose
        up to ``k`` tokens for ``drafted`` of them, everything else ``rest``.

        Rounds that also took in prompts must not be told: they would make decoding look slow.
        """
        self.costs.observe(batch, drafted, k, rows, draft, rest)

    def _holds(self, sequences: Sequence[Speculable], adaptive: Sequence[int]) -> bool:
        """Whether the choice in force, which is about these sequences, is to stay."""
        return (
            self._round < self._decide_at or self._waits(sequences, adaptive) or self._probe_runs()
        )

    def _waits(self, sequences: Sequence[Speculable], adaptive: Sequence[int]) -> bool:
        """Whether the choice in force can't be had yet: the devices draft for all at once, and the
        draft has yet to come near to some."""
        ks = self.choice.ks
        return self.together and any(ks[i] and not sequences[i].near for i in adaptive)

    def _probe_runs(self) -> bool:
        """Whether a probe has yet to show something: what runs by itself has to end first."""
        return self.everyone.seen == self._probe_seen and self._round < self._decide_at + PROBE_WAIT

    # --- the choice --------------------------------------------------------------------------

    @property
    def _unknown(self) -> bool:
        """Whether next to nothing is known of acceptance."""
        return self.everyone.seen < ENOUGH

    def _decide(
        self, sequences: Sequence[Speculable], adaptive: list[int], who: list[Acceptance]
    ) -> None:
        """Chooses anew, for a while."""
        same = who == self._who
        under_way = self.k > 0
        self._hold = 2 * self._hold if same else 1
        self._who = who
        batch = self._batch(sequences, adaptive)
        plain = batch.plain()
        ks, rate = batch.best()
        # A batch that has changed is told anew what to do in any case.
        change = self._change(sequences, plain) if same and self.choice.ks else 1.0
        if same and under_way and ks != self.choice.ks:
            now = batch.rate(self.choice.ks)
            if rate < (change if self._is_told(self.choice.ks, ks) else MARGIN) * now:
                ks, rate = self.choice.ks, now
        why = "pays"
        begins = max(change, PAYS if len(sequences) > 1 else 1.0)
        required = 1 / change if under_way else begins
        if rate <= plain * required:
            ks, rate, why = batch.nothing, plain, "does not pay"
            if under_way or self._unknown:
                ks, rate, why = self._unsure(sequences, adaptive, batch, plain)
        if not any(ks):
            if under_way:
                self._probe_later(sequences, adaptive, batch, plain)
            elif self._probes(sequences, adaptive, batch, plain):
                return
        if plain < rate < CLEARLY * plain and not self.costs.knows_plain(len(sequences)):
            # To know what rounds without a draft take costs next to nothing where they are close.
            self._put(ChosenKs(batch.nothing, plain, plain, "is compared with none"), who)
            self._decide_at = self._round + PLAIN_ROUNDS
            self._drafted = set(self._settled)  # the draft takes in what it lacks meanwhile
            return
        self._put(ChosenKs(ks, rate, plain, why), who)

    def _change(self, sequences: Sequence[Speculable], plain: float) -> float:
        """What a choice must promise beside the one in force, so that it is worth the change."""
        # A round without a draft writes one token for each.
        rounds = min(HORIZON, max(one.left for one in sequences))
        return MARGIN + self._change_rounds(len(sequences), plain) / max(rounds, 1)

    def _change_rounds(self, count: int, plain: float) -> float:
        """What a change costs, in rounds of ``count`` sequences without a draft."""
        seconds = count / plain if plain > 0 else 0.0
        return self.costs.change_seconds(seconds) / seconds if seconds else 1.0

    def _is_told(self, before: Sequence[int], after: Sequence[int]) -> bool:
        """Whether the services have to begin anew for these Ks: the devices' turns have the Ks
        that they began with, the hosts' have to know whether there are any."""
        if self.together:
            return before != after
        return any((a > 0) != (b > 0) for a, b in zip(before, after, strict=True))

    def _unsure(
        self,
        sequences: Sequence[Speculable],
        adaptive: Sequence[int],
        batch: SpeculableBatch,
        plain: float,
    ) -> tuple[tuple[int, ...], float, str]:
        """What to do where speculation seems not to pay: go on while that may be bad luck."""
        error = OPTIMISM * self._error(sequences, adaptive)
        if error * GRAIN < 1:
            return batch.nothing, plain, "does not pay"
        ks, hoped = self._batch(sequences, adaptive, error=error).best()
        rate = batch.rate(ks)
        if hoped > plain and rate >= LEAST * plain:
            return ks, rate, "may pay"
        return batch.nothing, plain, "does not pay"

    def _error(self, sequences: Sequence[Speculable], adaptive: Sequence[int]) -> float:
        """The standard deviation of what is believed of acceptance."""
        tries = sum(sequences[i].acceptance.tries for i in adaptive)
        rate = self.everyone.rate
        return math.sqrt(rate * (1 - rate) / (1 + tries))

    def _put(self, choice: ChosenKs, who: list[Acceptance]) -> None:
        if (max(choice.ks) > 0) != (self.k > 0):
            self._hold = 1
        self._probe_seen = -1
        self._hold = min(self._hold, HOLD if any(choice.ks) else HOLD_PLAIN)
        self._decide_at = self._round + self._hold
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
            sequences, adaptive, self._ks(len(sequences)), self.costs, self.everyone,
            together=self.together, error=error, hope=hope,
        )  # fmt: skip

    def _ks(self, count: int) -> Sequence[int]:
        """The Ks above 0 that are worth considering for so many sequences."""
        if self.together:
            ahead = [k for k in turns_ahead(count) if k <= self.max_k]
            if ahead:
                return ahead
        return range(1, self.max_k + 1)

    # --- trying again ------------------------------------------------------------------------

    def _probes(
        self,
        sequences: Sequence[Speculable],
        adaptive: Sequence[int],
        batch: SpeculableBatch,
        plain: float,
    ) -> bool:
        """Begins a probe where it is time for one; whether it did."""
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
        ks = self._probed(sequences, order)
        self._put(ChosenKs(ks, batch.rate(ks), plain, "is probed"), self._who)
        self._probe_seen = self.everyone.seen
        self._decide_at = self._round + _probe_rounds(adaptive)
        return True

    def _probed(self, sequences: Sequence[Speculable], order: Sequence[int]) -> tuple[int, ...]:
        """Ks of a probe of the first in ``order``; the devices draft for all or none."""
        probed = set(order if self.together else order[:PROBE_SEQUENCES])
        return tuple(int(i in probed) for i in range(len(sequences)))

    def _probe_later(
        self,
        sequences: Sequence[Speculable],
        adaptive: Sequence[int],
        batch: SpeculableBatch,
        plain: float,
    ) -> None:
        """Speculation ends: when it is to be tried again."""
        ks = self._probed(sequences, adaptive)
        # A probing round writes rate * its time; plain decoding would have done so in less.
        lost = max(0.0, 1 - batch.rate(ks) / plain) if plain > 0 else 0.0
        rounds = _probe_rounds(adaptive)
        cost = rounds * lost + 2 * self._change_rounds(len(sequences), plain)
        gap = int(cost / PROBE_SHARE)
        if rounds < PROBE_ROUNDS:
            # Several sequences soon show whether that was bad luck, where it might have been.
            error = self._error(sequences, adaptive)
            if self._batch(sequences, adaptive, error=error).best()[1] > WORTHWHILE * plain:
                gap = PROBE_SOON
        self._probe_at = self._round + min(max(gap, PROBE_SOON), PROBE_LATE)


def _probe_rounds(adaptive: Sequence[int]) -> int:
    """Rounds of a probe of these sequences."""
    return min(PROBE_ROUNDS, -(-PROBE_SEQUENCES // min(len(adaptive), PROBE_SEQUENCES)))
