"""How many tokens the draft proposes for each sequence of a round. Pure Python, deterministic.

A request may fix its K. For the others the controller picks the K with the most emitted tokens
per second,

    rate(K) = sum over sequences of E(K) / (draft(K) + verify(rows)),   E(K) = 1 + sum of p_1..p_i

where p_i is the sequence's estimated chance that position i is accepted given that the ones
before were (moving averages), and the times are those that rounds really took (``costs``). K = 0
skips the draft and is a candidate like any other: where speculation does not pay, it stops, and
is tried again from time to time, as often as a hundredth of the time allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from outrider.coordinator.requests.acceptance_rate import Acceptance
from outrider.coordinator.rounds.costs import Costs

START_K = 4
STEP = 2
"""How far beyond the largest K yet tried the next one may go."""
HOLD = 8
"""Rounds between decisions while the batch stays the same."""
EXPLORE = 24
"""Rounds between tries of a neighbouring K."""
STALE = 256
"""Rounds after which a measured time is worth measuring again."""
MARGIN = 1.02
"""A change of K must promise this much."""
PROBE_ROUNDS = 6
PROBE_SHARE = 0.01
"""Share of the time that probes may cost while speculation does not pay."""
PROBE_SOON, PROBE_LATE = 32, 4096
"""Least and most rounds between probes."""


@dataclass(slots=True)
class Speculable:
    """What the controller has to know of one sequence."""

    acceptance: Acceptance
    limit: int
    """Most draft tokens that make sense now; <= 0 for none."""
    fixed: int | None
    """The request's own K."""


class Speculation:
    """Chooses K, and learns from what the rounds did."""

    def __init__(self, max_k: int) -> None:
        """``max_k``: the largest K that both services allow."""
        self.limit = max_k
        """The configured largest K."""
        self.max_k = max_k
        """The largest K that the services allow now."""
        self.acceptance = Acceptance(floor=0.01)
        self._costs: dict[int, Costs] = {}
        self._round = 0
        self._key: tuple[int, ...] = ()
        self._k = START_K
        self._decide_at = 0
        self._explore_at = EXPLORE
        self._probe_at = 0
        self._probing = 0

    @property
    def k(self) -> int:
        """K in force for sequences that leave it to the server."""
        return self._k

    def wanted(self, fixed: int | None) -> bool:
        """Whether the draft is of use now or soon to a sequence with this K of its own."""
        if fixed is not None:
            return fixed > 0
        return self._k > 0 or self._probing > 0

    def choose(self, sequences: Sequence[Speculable]) -> list[int]:
        """K for each sequence of the next round."""
        self._round += 1
        adaptive = [one for one in sequences if one.fixed is None and one.limit > 0]
        k = self._adaptive_k(sequences, adaptive) if adaptive else 0
        return [self._own_k(one, k) for one in sequences]

    def observe(
        self, batch: int, k: int, rows: int, draft_seconds: float, verify_seconds: float
    ) -> None:
        """What a round of ``batch`` decoding sequences took; ``k`` is the largest of it.

        ``draft_seconds`` is ignored where ``k`` is 0. Rounds that also took in prompts must
        not be told: they would make decoding look slow.
        """
        costs = self._costs.setdefault(_bucket(batch), Costs())
        if k > 0:
            costs.draft.add(k, draft_seconds, self._round)
        costs.verify.add(_rounded(rows), verify_seconds, self._round)

    # --- the choice --------------------------------------------------------------------------

    def _adaptive_k(self, sequences: Sequence[Speculable], adaptive: Sequence[Speculable]) -> int:
        top = min(self.max_k, max(one.limit for one in adaptive))
        if self._probing > 0:
            self._probing -= 1
            if self._probing == 0:
                self._end_probe(sequences, top)
            return min(max(1, self._probe_k(sequences, top)), top)
        key = (len(sequences), len(adaptive))
        if self._round >= self._decide_at or key != self._key:
            self._key = key
            self._decide_at = self._round + HOLD
            self._k = self._best(sequences, top)
        if self._k == 0:
            return self._maybe_probe(sequences, top)
        if self._round >= self._explore_at:
            self._explore_at = self._round + EXPLORE
            return self._neighbour(sequences, top)
        return min(self._k, top)

    def _best(self, sequences: Sequence[Speculable], top: int) -> int:
        costs = self._costs.get(_bucket(len(sequences)))
        if costs is None:
            costs = self._nearest(len(sequences))
        if costs is None:
            self._decide_at = self._round + 1
            return START_K
        untried = self._untried(costs, sequences, top)
        if untried is not None:
            self._decide_at = self._round + 1
            return untried
        # Far beyond what was tried, times and chances are guesses: go there step by step.
        top = min(top, max(START_K, costs.draft.largest) + STEP)
        rates = [self._rate(costs, sequences, k) for k in range(top + 1)]
        best = max(range(top + 1), key=lambda k: rates[k])
        current = min(self._k, top)
        chosen = best if rates[best] > MARGIN * rates[current] else current
        # Speculation has to beat plain decoding, not only to be no worse than it was.
        return chosen if chosen and rates[chosen] > rates[0] else 0 if chosen else best

    def _untried(self, costs: Costs, sequences: Sequence[Speculable], top: int) -> int | None:
        """A K that anchors the curves and has not been measured well enough."""
        for k in (START_K, 0, 1):
            if k <= top:
                point = costs.verify.point(_rounded(self._rows(sequences, k)))
                if point is None or point.tries < 2:
                    return k
        return None

    def _rate(self, costs: Costs, sequences: Sequence[Speculable], k: int) -> float:
        """Tokens per second expected at ``k``."""
        tokens = 0.0
        longest = 0
        for one in sequences:
            own = self._own_k(one, k)
            longest = max(longest, own)
            tokens += 1.0 + sum(one.acceptance.survival(own))
        verify = costs.verify_seconds(self._rows(sequences, k))
        if not verify:
            return 0.0
        return tokens / (costs.draft_seconds(longest) + verify)

    def _own_k(self, one: Speculable, k: int) -> int:
        wanted = k if one.fixed is None else one.fixed
        # Comparisons rather than min and max: this runs for every sequence of every round.
        if wanted > self.max_k:
            wanted = self.max_k
        if wanted > one.limit:
            wanted = one.limit
        return wanted if wanted > 0 else 0

    def _rows(self, sequences: Sequence[Speculable], k: int) -> int:
        return sum(self._own_k(one, k) + 1 for one in sequences)

    def _nearest(self, batch: int) -> Costs | None:
        bucket = _bucket(batch)
        known = sorted(self._costs, key=lambda other: (abs(other - bucket), other))
        # Other batch sizes have other row counts; only a neighbour says anything at all.
        return self._costs[known[0]] if known and abs(known[0] - bucket) <= 1 else None

    # --- trying things -----------------------------------------------------------------------

    def _neighbour(self, sequences: Sequence[Speculable], top: int) -> int:
        """The neighbour of K whose times are the oldest, where they are old; else K itself."""
        costs = self._costs.get(_bucket(len(sequences)))
        if costs is None:
            return min(self._k, top)
        oldest, chosen = self._round - STALE, min(self._k, top)
        for k in (self._k + 1, self._k - 1, self._k + 2, 0):
            if 0 <= k <= top:
                point = costs.verify.point(_rounded(self._rows(sequences, k)))
                seen = -STALE if point is None else point.seen_at
                if seen < oldest:
                    oldest, chosen = seen, k
        return chosen

    def _maybe_probe(self, sequences: Sequence[Speculable], top: int) -> int:
        if self._probe_at == 0:
            self._probe_at = self._round + PROBE_SOON
        if self._round < self._probe_at or top < 1:
            return 0
        self._probing = PROBE_ROUNDS
        return 0  # one round's notice lets the draft catch up in the background

    def _probe_k(self, sequences: Sequence[Speculable], top: int) -> int:
        """The most promising K > 0."""
        costs = self._costs.get(_bucket(len(sequences)))
        if costs is None or top < 1:
            return 1
        return max(range(1, top + 1), key=lambda k: self._rate(costs, sequences, k))

    def _end_probe(self, sequences: Sequence[Speculable], top: int) -> None:
        self._k = self._best(sequences, top)
        self._decide_at = self._round + HOLD
        self._probe_at = 0 if self._k else self._round + self._probe_gap(sequences, top)

    def _probe_gap(self, sequences: Sequence[Speculable], top: int) -> int:
        """Rounds until the next probe, so that what probes lose stays within their share."""
        costs = self._costs.get(_bucket(len(sequences)))
        k = self._probe_k(sequences, top)
        if costs is None:
            return PROBE_SOON
        plain, probed = self._rate(costs, sequences, 0), self._rate(costs, sequences, k)
        seconds = costs.verify_seconds(self._rows(sequences, 0))
        tried = costs.verify_seconds(self._rows(sequences, k))
        if not (plain and probed and seconds and tried):
            return PROBE_SOON
        # A probing round emits probed * its time; plain decoding would have done so in less.
        lost = (costs.draft_seconds(k) + tried) * (1 - probed / plain) / seconds
        return int(min(max(PROBE_ROUNDS * lost / PROBE_SHARE, PROBE_SOON), PROBE_LATE))


def _bucket(batch: int) -> int:
    """Batches of 1, 2, 3-4, 5-8, ... share their times."""
    return (max(1, batch) - 1).bit_length()


def _rounded(rows: int) -> int:
    """Many rows need no exact count; few do."""
    return rows if rows <= 64 else -(-rows // 16) * 16
