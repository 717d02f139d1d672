"""How often a sequence's proposals are accepted, by position. Pure Python."""

from __future__ import annotations

PRIOR = 0.7
"""Chance of acceptance assumed before anything was seen."""
BELIEF = 4
"""Observations that a first guess counts as."""


class Acceptance:
    """Chance of acceptance by position, given that all positions before were accepted."""

    __slots__ = ("_counts", "_floor", "_parent", "_rates")

    def __init__(self, parent: Acceptance | None = None, *, floor: float = 0.03) -> None:
        """Starts from ``parent``'s estimates and teaches it; ``floor`` is the least weight."""
        self._parent = parent
        self._floor = floor
        self._rates: list[float] = list(parent._rates) if parent else []
        # What is inherited counts as a few observations.
        self._counts: list[int] = [min(BELIEF, n) for n in parent._counts] if parent else []

    def observe(self, proposed: int, accepted: int) -> None:
        """A verdict: positions after the first rejected one say nothing."""
        for position in range(min(accepted + 1, proposed)):
            if position == len(self._rates):
                self._rates.append(self._rates[-1] if self._rates else PRIOR)
                self._counts.append(BELIEF)
            self._counts[position] += 1
            weight = max(self._floor, 1.0 / self._counts[position])
            self._rates[position] += weight * ((position < accepted) - self._rates[position])
        if self._parent is not None:
            self._parent.observe(proposed, accepted)

    def survival(self, k: int) -> list[float]:
        """Chance that positions 1..i are all accepted, for i = 1..k."""
        made = []
        chance = 1.0
        for position in range(k):
            chance *= self.rate(position)
            made.append(chance)
        return made

    def rate(self, position: int) -> float:
        """Chance at ``position`` (from 0); unseen positions are like the last seen one."""
        if not self._rates:
            return PRIOR
        return self._rates[min(position, len(self._rates) - 1)]
