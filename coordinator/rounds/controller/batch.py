"""One batch as the choice of K sees it, and what Ks promise for it. Pure Python.

    rate(K_1 … K_n) = sum of E_i(K_i) / (draft(max K_i) + verify(rows))
    E_i(K) = 1 + s_i1 + … + s_iK

where s_ij is the chance that position j of a proposal for sequence i is accepted along with all
before it (``acceptance_rate``), and the times are those of ``costs``.

Which Ks are worth comparing: one more token for one sequence adds s_ij tokens for a row's time, so
the best Ks of one cost take in every position with s_ij above some threshold, up to a largest K.
Thresholds and largest Ks are few, and their sums come from one table for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from outrider.coordinator.requests.acceptance_rate import Acceptance, Everyone, survival
from outrider.coordinator.rounds.controller.costs import Costs

THRESHOLDS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
"""Chances of acceptance from which on a position may be worth its row."""
GRAIN = 50
"""Acceptance is told apart by so many steps from 0 to 1."""


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
    left: int = 1 << 30
    """Tokens that may still be written."""
    near: bool = True
    """Whether the draft has taken in enough of its text to propose in the next round."""


def clipped(sequences: Sequence[Speculable], ks: Sequence[int], most: int) -> list[int]:
    """``ks`` for those that leave it to the server, their own K for the others: none above ``most``
    or what makes sense, and 0 where the draft is not near."""
    made = []
    for one, k in zip(sequences, ks, strict=True):
        # Comparisons rather than min and max: this runs for every sequence of every round.
        if one.fixed is not None:
            k = one.fixed
        if k > most:
            k = most
        if k > one.limit:
            k = one.limit
        if not one.near:
            k = 0
        made.append(k if k > 0 else 0)
    return made


class SpeculableBatch:
    """A batch, with the chances that the positions of proposals for it are accepted."""

    def __init__(
        self,
        sequences: Sequence[Speculable],
        adaptive: Sequence[int],
        ks: Sequence[int],
        costs: Costs,
        everyone: Everyone,
        *,
        together: bool,
        error: float = 0.0,
        hope: float | None = None,
    ) -> None:
        """``adaptive``: places of those whose K is to be chosen, and can be above 0; ``ks``: the
        Ks above 0 to choose among, rising; ``together``: see ``Speculation``. ``hope``: the
        acceptance to assume; None: what is believed, and ``error`` more."""
        self._count, self._adaptive, self._together = len(sequences), adaptive, together
        self._costs = costs
        max_k = ks[-1]
        self._ks = frozenset(ks)
        self._top = top = min(max_k, max(sequences[i].limit for i in adaptive))
        shape = everyone.shape(max_k)
        self._chances: list[list[float]] = []
        """Of each adaptive one: chance that positions 0..j are all accepted, up to its limit."""
        groups: dict[tuple[int, int], tuple[list[float], int]] = {}
        for i in adaptive:
            one = sequences[i]
            rate = one.acceptance.rate(one.at) + error if hope is None else hope
            key = int(GRAIN * rate + 0.5), min(one.limit, top)
            found = groups.get(key)
            if found is None:
                found = survival(key[0] / GRAIN, shape[: key[1]]), 0
            groups[key] = found[0], found[1] + 1
            self._chances.append(found[0])
        self._groups = list(groups.values())
        """The distinct ones among them, and how many there are of each."""
        # Of those with their own K: tokens and rows beyond one each, how many, and the largest K.
        self._fixed_tokens, self._fixed_rows, self._fixed_drafted, self._fixed_k = 0.0, 0, 0, 0
        for one, k in zip(sequences, clipped(sequences, self.nothing, max_k), strict=True):
            if k:
                self._fixed_rows += k
                self._fixed_drafted += 1
                self._fixed_k = max(self._fixed_k, k)
                self._fixed_tokens += sum(survival(one.acceptance.rate(one.at), shape[:k]))
        self._draft_factors, self._rest_factors = costs.factors(
            self._count, max(top, self._fixed_k)
        )

    @property
    def nothing(self) -> tuple[int, ...]:
        """K = 0 for all whose K is not their own."""
        return (0,) * self._count

    def plain(self) -> float:
        """The rate of ``nothing``."""
        return self._rate(0.0, 0, 0, 0)

    def rate(self, ks: Sequence[int]) -> float:
        """Tokens a second of all sequences together."""
        tokens, rows, drafted, most = 0.0, 0, 0, 0
        for i, chances in zip(self._adaptive, self._chances, strict=True):
            k = min(ks[i], len(chances))
            if k:
                tokens += sum(chances[:k])
                rows, drafted, most = rows + k, drafted + 1, max(most, k)
        return self._rate(tokens, rows, drafted, most)

    def best(self) -> tuple[tuple[int, ...], float]:
        """The best Ks above 0 for some, and their rate."""
        tokens_of, rows_of = self._table()
        best, rate = (0, 0), 0.0
        for level in range(len(THRESHOLDS)):
            if level and rows_of[level] == rows_of[level - 1]:
                continue
            tokens, rows = 0.0, 0
            drafted = rows_of[level][0]
            for k in range(1, self._top + 1):
                new = rows_of[level][k - 1]
                if not new:
                    break
                tokens, rows = tokens + tokens_of[level][k - 1], rows + new
                if k not in self._ks and k != self._top:
                    continue
                found = self._rate(tokens, rows, drafted, k)
                if found > rate:
                    best, rate = (level, k), found
        level, k = best
        ks = list(self.nothing)
        for i, chances in zip(self._adaptive, self._chances, strict=True):
            own = 0
            for chance in chances[:k]:
                if chance < THRESHOLDS[level] and not (own == 0 and self._together):
                    break
                own += 1
            ks[i] = own
        return tuple(ks), rate

    def _rate(self, tokens: float, rows: int, drafted: int, k: int) -> float:
        """Tokens a second where the adaptive sequences have so many more ``tokens`` and ``rows``
        than one each, ``drafted`` of them up to ``k``."""
        count, most = self._count, max(k, self._fixed_k)
        seconds = self._rest_factors[most] * self._costs.rest_seconds(
            count, count + self._fixed_rows + rows
        )
        if most:
            drafting = self._costs.draft_seconds(self._fixed_drafted + drafted, most)
            seconds += self._draft_factors[most] * drafting
        return (count + self._fixed_tokens + tokens) / seconds if seconds > 0 else 0.0

    def _table(self) -> tuple[list[list[float]], list[list[int]]]:
        """Tokens and rows of the positions at or above each threshold, all adaptive sequences
        together: by threshold and position."""
        levels, top = len(THRESHOLDS), self._top
        tokens = [[0.0] * top for _ in range(levels)]
        rows = [[0] * top for _ in range(levels)]
        for chances, count in self._groups:
            level = 0
            for position, chance in enumerate(chances):
                while chance < THRESHOLDS[level]:
                    level += 1
                own = 0 if position == 0 and self._together else level
                tokens[own][position] += count * chance
                rows[own][position] += count
        for level in range(1, levels):
            for position in range(top):
                tokens[level][position] += tokens[level - 1][position]
                rows[level][position] += rows[level - 1][position]
        return tokens, rows
