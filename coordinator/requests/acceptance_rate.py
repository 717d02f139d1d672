"""How often proposals are accepted: of one sequence, and of all. Pure Python.

A sequence has one estimate, the chance that a token is accepted given that the ones before it
were; it learns from every position and leans on what all sequences show, so that it is worth
something from its first round on:

    rate = (hits + BELIEF * rate of all) / (tries + BELIEF)

Older tries count less, tries and tokens alike, so the estimate moves with the text. How the
chance changes with the position in a proposal is learnt from all sequences together.
"""

from __future__ import annotations

PRIOR = 0.7
"""Chance of acceptance assumed before anything was seen."""
BELIEF = 4.0
"""Tries that what all sequences show counts as."""
KEEP = 0.985
"""What a try counts for after one more of the same sequence."""
FADE = 0.99
"""What it counts for after one more token of the text, tried or not."""
KEEP_ALL = 0.992
"""What a try of any sequence counts for after one more of any."""
SMOOTH = 16.0
"""Tries that a position counts as before it has any: like the others."""
MOST = 0.995
"""No chance is taken to be higher."""


class Acceptance:
    """Chance of acceptance, of one sequence or of all."""

    __slots__ = ("_all", "_at", "_hits", "_tries")

    def __init__(self, everyone: Everyone) -> None:
        """``everyone``: what all sequences show; is taught by this one."""
        self._all = everyone
        self._hits = self._tries = 0.0
        self._at = 0

    def observe(self, proposed: int, accepted: int, at: int = 0) -> None:
        """A verdict when the text had ``at`` tokens; positions after the first rejected one say
        nothing."""
        self._all.observe(proposed, accepted, self.rate(at))
        tried = min(accepted + 1, proposed)
        keep = KEEP**tried * self._weight(at)
        self._at = max(self._at, at)
        self._hits = self._hits * keep + accepted
        self._tries = self._tries * keep + tried

    def rate(self, at: int = 0) -> float:
        """The chance where the text has ``at`` tokens."""
        weight = self._weight(at)
        return (self._hits * weight + BELIEF * self._all.rate) / (self._tries * weight + BELIEF)

    @property
    def tries(self) -> float:
        """Tries that the estimate rests on, as of the last verdict."""
        return self._tries

    def _weight(self, at: int) -> float:
        """What the tries count for where the text has ``at`` tokens."""
        return FADE ** max(0, at - self._at)


class Everyone:
    """What all sequences show."""

    def __init__(self) -> None:
        self._hits = self._tries = self._foreseen = 0.0
        self._by_position: list[list[float]] = []
        """Of each position: hits, and how many its sequences' own rates had foreseen."""
        self.seen = 0
        """Verdicts so far."""
        self.rate = PRIOR
        """Chance of acceptance over all positions, given that those before were accepted."""

    def observe(self, proposed: int, accepted: int, rate: float) -> None:
        """A verdict on a proposal for a sequence whose rate was taken to be ``rate``."""
        self.seen += 1
        for position in range(min(accepted + 1, proposed)):
            if position == len(self._by_position):
                self._by_position.append([0.0, 0.0])
            hit = position < accepted
            one = self._by_position[position]
            one[0] = one[0] * KEEP_ALL + hit
            one[1] = one[1] * KEEP_ALL + rate
            self._hits = self._hits * KEEP_ALL + hit
            self._tries = self._tries * KEEP_ALL + 1.0
            self._foreseen = self._foreseen * KEEP_ALL + rate
        self.rate = (self._hits + BELIEF * PRIOR) / (self._tries + BELIEF)

    def shape(self, positions: int) -> list[float]:
        """What a sequence's rate is to be multiplied by, for each position of a proposal.

        Against what the same sequences' own rates had foreseen: those that get beyond the first
        positions are the well accepted ones, and say nothing of the others.
        """
        average = (self._hits + SMOOTH) / (self._foreseen + SMOOTH)
        made = [
            (hits + SMOOTH) / (foreseen + SMOOTH) / average for hits, foreseen in self._by_position
        ]
        return [*made[:positions], *[1.0] * (positions - len(made))]


def survival(rate: float, shape: list[float]) -> list[float]:
    """Chance that positions 0..i are all accepted, for each i of ``shape``."""
    made, chance = [], 1.0
    for factor in shape:
        chance *= min(rate * factor, MOST)
        made.append(chance)
    return made
