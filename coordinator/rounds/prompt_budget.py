"""How many rows of prompts there is time for in a round. Pure Python."""

from __future__ import annotations

from collections import deque
from statistics import median_low

SAMPLES = 5
"""Rounds remembered, with prompts and without."""
START_ROWS = 512
"""Rows tried where nothing is known."""
GROWTH = 4
"""How many times the rows of the largest chunk remembered the next one may have."""
LEAST_ROWS = 16
"""So many are taken whatever they cost, so that every prompt comes to its end."""
ALONE = 4
"""Where nobody is delayed but those that may yet come, chunks take this many times as long."""


class PromptBudget:
    """How many rows of prompts one message to one service takes along.

    Rows of prompts make a forward longer, and whoever gets a token from that forward, or waits for
    the next one, is delayed by as much. So the time is set and the rows follow from it:

        rows = seconds / (seconds of one row)

    A forward also takes a time that has nothing to do with its prompts: the weights are read and
    those that decode have rows too. That is the median of recent rounds without prompts; the rest
    of a round's time is what its prompt rows took. Of several rounds the median by rows counts:
    one pause of the machine changes nothing, and a large chunk says more than a few rows do.

    What is left beside the fixed time may be next to nothing, and mostly noise. So the guess goes
    no farther than a few times what was tried, or than is safe if all the time was the rows'.
    """

    def __init__(self, seconds: float, most: int) -> None:
        """``seconds`` that the rows may take where somebody is delayed; ``most``: rows at most."""
        self._seconds = seconds
        self._most = most
        self._prompts: deque[tuple[int, float]] = deque(maxlen=SAMPLES)
        self._without: deque[float] = deque(maxlen=SAMPLES)
        self._reach = START_ROWS
        self._row_seconds = 0.0  # 0 where nothing is known
        self._most_row_seconds = 0.0  # if there were no fixed time

    def rows(self, *, delays: bool) -> int:
        """Rows to take in; >= 1. ``delays``: whether somebody waits who is not taken in."""
        seconds = self._seconds if delays else ALONE * self._seconds
        rows = float(self._reach)
        if self._most_row_seconds > 0:
            rows = max(rows, seconds / self._most_row_seconds)
        if self._row_seconds > 0:
            rows = min(rows, seconds / self._row_seconds)
        return int(min(max(rows, LEAST_ROWS), self._most))

    def observe(self, rows: int, seconds: float) -> None:
        """A message with ``rows`` of prompts took the service ``seconds``; 0 rows: without any."""
        if rows <= 0:
            self._without.append(seconds)
            return
        self._prompts.append((rows, seconds))
        fixed = median_low(self._without) if self._without else 0.0
        self._row_seconds = _median_by_weight(
            [(max(0.0, spent - fixed) / count, count) for count, spent in self._prompts]
        )
        self._most_row_seconds = _median_by_weight(
            [(spent / count, count) for count, spent in self._prompts]
        )
        self._reach = max(START_ROWS, GROWTH * max(count for count, _ in self._prompts))


def _median_by_weight(values: list[tuple[float, int]]) -> float:
    """The least of ``(value, weight)`` up to which half of the weight lies."""
    half = sum(weight for _, weight in values) / 2
    reached = 0
    for value, weight in sorted(values):
        reached += weight
        if reached >= half:
            return value
    return 0.0
