"""How many tokens the draft proposes for each sequence of a round. Pure Python, deterministic.

A request may fix its K. For the others the controller takes the Ks with the most tokens a second,

    rate(K_1 … K_n) = sum of E_i(K_i) / (draft(max K_i) + verify(rows))
    E_i(K) = 1 + s_i1 + … + s_iK

where s_ij is the chance that position j of a proposal for sequence i is accepted along with all
before it (``acceptance_rate``), and the times are those measured at the start, corrected by what
rounds really took (``costs``). K = 0 for all skips the draft and is a candidate like any other.

Which Ks are worth comparing: one more token for one sequence adds s_ij tokens for a row's time, so
the best Ks of one cost take in every position with s_ij above some threshold, up to a largest K.
Thresholds and largest Ks are few, and their sums come from one table for all of them.

Where speculation does not pay it is tried again from time to time, with some of the sequences,
for acceptance moves with the text: as often as a hundredth of the time allows, and not at all
where by the costs even the best acceptance would not pay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from outrider.coordinator.requests.acceptance_rate import Acceptance, Everyone, survival
from outrider.coordinator.rounds.controller.costs import Costs

THRESHOLDS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
"""Chances of acceptance from which on a position may be worth its row."""
HOLD = 8
"""Rounds between decisions, at most, while the batch stays the same."""
HOLD_PLAIN = 32
"""The same where nothing is drafted, and so nothing learnt."""
GRAIN = 50
"""Acceptance is told apart by so many steps from 0 to 1."""
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


@dataclass(slots=True)
class Speculable:
    """What the controller has to know of one sequence."""

    acceptance: Acceptance
    limit: int
    """Most draft tokens that make sense now; <= 0 for none."""
    fixed: int | None
    """The request's own K."""
    at: int = 0
    """Tokens of its text."""


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


@dataclass(slots=True)
class _Table:
    """Sums over the positions of all adaptive sequences, by threshold and position (from 1)."""

    tokens: list[list[float]]
    rows: list[list[int]]


@dataclass(slots=True)
class _Batch:
    """One batch as the choice sees it."""

    sequences: Sequence[Speculable]
    adaptive: list[int]
    """Places of those whose K is to be chosen, and can be above 0."""
    chances: list[list[float]]
    """Of each of those: chance that positions 0..j are all accepted, up to its limit."""
    groups: list[tuple[list[float], int]]
    """The distinct ones among ``chances``, and how many there are of each."""
    top: int
    fixed_tokens: float = 0.0
    fixed_rows: int = 0
    fixed_drafted: int = 0
    fixed_k: int = 0
    """Of those with their own K: tokens and rows beyond one each, how many, and the largest K."""
    draft_factors: list[float] = field(default_factory=list)
    rest_factors: list[float] = field(default_factory=list)


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
        self._probing = 0

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
            return [self._clipped(one, one.fixed or 0) for one in sequences]
        who = [one.acceptance for one in sequences]
        if self._probing:
            if who == self._who:
                self._probing -= 1
                return self._in_force(sequences)
            self._probing = 0
        if who != self._who or self._round >= self._decide_at:
            self._decide(sequences, adaptive, who)
        return self._in_force(sequences)

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

    def _in_force(self, sequences: Sequence[Speculable]) -> list[int]:
        most = self.max_k
        made = []
        for one, k in zip(sequences, self.choice.ks, strict=True):
            # Comparisons rather than min and max: this runs for every sequence of every round.
            if one.fixed is not None:
                k = one.fixed
            if k > most:
                k = most
            if k > one.limit:
                k = one.limit
            made.append(k if k > 0 else 0)
        return made

    def _clipped(self, one: Speculable, k: int) -> int:
        return max(0, min(k, self.max_k, one.limit))

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
        plain = self._plain(batch)
        ks, rate = self._best(batch)
        if same and self.choice.ks and ks != self.choice.ks:
            now = self._rate_of(batch, self.choice.ks)
            if rate < MARGIN * now and now >= plain:
                ks, rate = self.choice.ks, now
        why = "pays"
        if rate <= plain * (PAYS if len(sequences) > 1 else 1.0):
            ks, rate, why = self._unsure(batch, plain)
        if not any(ks) and self._probes(sequences, batch, plain):
            return
        if plain < rate < CLEARLY * plain and not self.costs.knows_plain(len(sequences)):
            # Rounds without a draft run in another way than those timed at the start, and to
            # know how much faster costs next to nothing where the two are close.
            ks, rate, why = self._nothing(batch), plain, "is compared with none"
            self._decide_at = self._round + PLAIN_ROUNDS
        self._put(ChosenKs(ks, rate, plain, why), who)

    def _unsure(self, batch: _Batch, plain: float) -> tuple[tuple[int, ...], float, str]:
        """What to do where speculation seems not to pay: go on while that may be bad luck."""
        ones = [batch.sequences[i] for i in batch.adaptive]
        tries = sum(one.acceptance.tries for one in ones)
        rate = self.everyone.rate
        error = OPTIMISM * math.sqrt(rate * (1 - rate) / (1 + tries))
        if error * GRAIN < 1:
            return self._nothing(batch), plain, "does not pay"
        ks, hoped = self._best(self._batch(batch.sequences, batch.adaptive, error=error))
        rate = self._rate_of(batch, ks)
        if hoped > plain and rate >= LEAST * plain:
            return ks, rate, "may pay"
        return self._nothing(batch), plain, "does not pay"

    def _put(self, choice: ChosenKs, who: list[Acceptance]) -> None:
        self.choice = choice
        self._settled = {id(one) for one in who}
        self._drafted = {id(one) for one, k in zip(who, choice.ks, strict=True) if k}

    def _batch(
        self,
        sequences: Sequence[Speculable],
        adaptive: list[int],
        *,
        hope: float | None = None,
        error: float = 0.0,
    ) -> _Batch:
        """``hope``: the acceptance to assume; None: what is believed, and ``error`` more."""
        top = min(self.max_k, max(sequences[i].limit for i in adaptive))
        shape = self.everyone.shape(self.max_k)
        chances: list[list[float]] = []
        groups: dict[tuple[int, int], tuple[list[float], int]] = {}
        for i in adaptive:
            one = sequences[i]
            rate = one.acceptance.rate(one.at) + error if hope is None else hope
            key = int(GRAIN * rate + 0.5), min(one.limit, top)
            found = groups.get(key)
            if found is None:
                found = survival(key[0] / GRAIN, shape[: key[1]]), 0
            groups[key] = found[0], found[1] + 1
            chances.append(found[0])
        made = _Batch(sequences, adaptive, chances, list(groups.values()), top)
        for one in sequences:
            k = self._clipped(one, one.fixed) if one.fixed is not None else 0
            if k:
                made.fixed_rows += k
                made.fixed_drafted += 1
                made.fixed_k = max(made.fixed_k, k)
                made.fixed_tokens += sum(survival(one.acceptance.rate(one.at), shape[:k]))
        made.draft_factors, made.rest_factors = self.costs.factors(
            len(sequences), max(top, made.fixed_k)
        )
        return made

    def _nothing(self, batch: _Batch) -> tuple[int, ...]:
        return (0,) * len(batch.sequences)

    def _plain(self, batch: _Batch) -> float:
        """The rate with K = 0 for all whose K is not their own."""
        return self._rate(batch, 0.0, 0, 0, 0)

    def _rate(self, batch: _Batch, tokens: float, rows: int, drafted: int, k: int) -> float:
        """Tokens a second where the adaptive sequences have so many more ``tokens`` and ``rows``
        than one each, ``drafted`` of them up to ``k``."""
        count = len(batch.sequences)
        most = max(k, batch.fixed_k)
        seconds = batch.rest_factors[most] * self.costs.rest_seconds(
            count, count + batch.fixed_rows + rows
        )
        if most:
            drafting = self.costs.draft_seconds(batch.fixed_drafted + drafted, most)
            seconds += batch.draft_factors[most] * drafting
        return (count + batch.fixed_tokens + tokens) / seconds if seconds > 0 else 0.0

    def _rate_of(self, batch: _Batch, ks: Sequence[int]) -> float:
        tokens, rows, drafted, most = 0.0, 0, 0, 0
        for i, chances in zip(batch.adaptive, batch.chances, strict=True):
            k = min(ks[i], len(chances))
            if k:
                tokens += sum(chances[:k])
                rows, drafted, most = rows + k, drafted + 1, max(most, k)
        return self._rate(batch, tokens, rows, drafted, most)

    def _best(self, batch: _Batch) -> tuple[tuple[int, ...], float]:
        """The best Ks above 0 for some, and their rate."""
        table = self._table(batch)
        best, rate = (0, 0), 0.0
        for level in range(len(THRESHOLDS)):
            if level and table.rows[level] == table.rows[level - 1]:
                continue
            tokens, rows = 0.0, 0
            drafted = table.rows[level][0]
            for k in range(1, batch.top + 1):
                new = table.rows[level][k - 1]
                if not new:
                    break
                tokens, rows = tokens + table.tokens[level][k - 1], rows + new
                found = self._rate(batch, tokens, rows, drafted, k)
                if found > rate:
                    best, rate = (level, k), found
        level, k = best
        ks = [0] * len(batch.sequences)
        for i, chances in zip(batch.adaptive, batch.chances, strict=True):
            own = 0
            for chance in chances[:k]:
                if chance < THRESHOLDS[level] and not (own == 0 and self.together):
                    break
                own += 1
            ks[i] = own
        return tuple(ks), rate

    def _table(self, batch: _Batch) -> _Table:
        """Tokens and rows of the positions at or above each threshold."""
        levels, top = len(THRESHOLDS), batch.top
        tokens = [[0.0] * top for _ in range(levels)]
        rows = [[0] * top for _ in range(levels)]
        for chances, count in batch.groups:
            level = 0
            for position, chance in enumerate(chances):
                while chance < THRESHOLDS[level]:
                    level += 1
                own = 0 if position == 0 and self.together else level
                tokens[own][position] += count * chance
                rows[own][position] += count
        for level in range(1, levels):
            for position in range(top):
                tokens[level][position] += tokens[level - 1][position]
                rows[level][position] += rows[level - 1][position]
        return _Table(tokens, rows)

    # --- trying again ------------------------------------------------------------------------

    def _probes(self, sequences: Sequence[Speculable], batch: _Batch, plain: float) -> bool:
        """Begins a probe where it is time for one; whether it did."""
        if not self._probe_at:
            self._probe_at = self._round + (0 if self._unknown else PROBE_SOON)
        if self._round < self._probe_at:
            return False
        _, hoped = self._best(self._batch(sequences, batch.adaptive, hope=HOPE))
        if hoped <= MARGIN * plain:
            self._probe_at = self._round + PROBE_LATE
            return False
        # Those whose estimate rests on least.
        order = sorted(batch.adaptive, key=lambda i: sequences[i].acceptance.tries)
        probed = order[:PROBE_SEQUENCES]
        ks = [0] * len(sequences)
        for i in probed:
            ks[i] = 1
        rounds = min(PROBE_ROUNDS, -(-PROBE_SEQUENCES // len(probed)))
        rate = self._rate_of(batch, ks)
        # A probing round writes rate * its time; plain decoding would have done so in less.
        lost = max(0.0, 1 - rate / plain) if plain > 0 else 0.0
        gap = int((rounds * lost + PROBE_ROUNDS_BESIDE) / PROBE_SHARE)
        self._probe_at = self._round + min(max(gap, PROBE_SOON), PROBE_LATE)
        self._probing = rounds - 1
        self._decide_at = self._round + rounds
        self._hold = 1
        self._put(ChosenKs(tuple(ks), rate, plain, "is probed"), self._who)
        return True
