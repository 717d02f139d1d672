"""What a round costs, learnt from the rounds that ran, and how many rows of prompts there is time
for. Pure Python.

A service's time for one batch size is a curve over "how much was asked" (draft: K; verify:
rows). Measured points are kept as the median of their last few samples, so that one pause of
the machine changes nothing. Between points the curve is a straight line. Beyond them the guess
is on the low side: an untried amount must look worth trying, and one try corrects it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from statistics import median_low

SAMPLES = 5
"""Samples kept per point, and rounds with prompts and without."""
START_ROWS = 512
"""Rows tried where nothing is known."""
GROWTH = 4
"""How many times the rows of the largest chunk remembered the next one may have."""
LEAST_ROWS = 16
"""So many are taken whatever they cost, so that every prompt comes to its end."""
ALONE = 4
"""Where nobody is delayed but those that may yet come, chunks take this many times as long."""


class Point:
    """Times measured for one amount."""

    __slots__ = ("_samples", "seconds", "seen_at", "tries")

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=SAMPLES)
        self.seconds = 0.0
        self.seen_at = 0
        self.tries = 0

    def add(self, seconds: float, now: int) -> None:
        """A sample taken in round ``now``."""
        self._samples.append(seconds)
        self.seconds = sorted(self._samples)[(len(self._samples) - 1) // 2]
        self.seen_at = now
        self.tries += 1


class Curve:
    """Seconds over amount, for amounts >= ``first``."""

    __slots__ = ("_amounts", "_points")

    def __init__(self) -> None:
        self._amounts: list[int] = []
        self._points: dict[int, Point] = {}

    def add(self, amount: int, seconds: float, now: int) -> None:
        """A sample for ``amount`` taken in round ``now``."""
        point = self._points.get(amount)
        if point is None:
            point = self._points[amount] = Point()
            self._amounts.insert(bisect_left(self._amounts, amount), amount)
        point.add(seconds, now)

    @property
    def largest(self) -> int:
        """The largest amount measured; 0 for none."""
        return self._amounts[-1] if self._amounts else 0

    def point(self, amount: int) -> Point | None:
        """What was measured for exactly ``amount``."""
        return self._points.get(amount)

    def at(self, amount: int) -> float | None:
        """Seconds expected for ``amount``; None before the first sample."""
        amounts = self._amounts
        if not amounts:
            return None
        index = bisect_left(amounts, amount)
        if index < len(amounts) and amounts[index] == amount:
            return self._points[amount].seconds
        if index == 0 or index == len(amounts):
            return self._beyond(amount)
        low, high = amounts[index - 1], amounts[index]
        start, end = self._points[low].seconds, self._points[high].seconds
        return start + (end - start) * (amount - low) / (high - low)

    def _beyond(self, amount: int) -> float:
        """Outside the measured range: the line through its ends, never falling."""
        low, high = self._amounts[0], self._amounts[-1]
        start, end = self._points[low].seconds, self._points[high].seconds
        slope = max(0.0, (end - start) / (high - low)) if high > low else 0.0
        if amount < low:
            return max(0.0, start - slope * (low - amount))
        return end + slope * (amount - high)


class Costs:
    """The two curves for batches of about one size."""

    __slots__ = ("draft", "verify")

    def __init__(self) -> None:
        self.draft = Curve()
        self.verify = Curve()

    def draft_seconds(self, k: int) -> float:
        """Seconds of a proposal of ``k``; 0 where nothing is known."""
        if k == 0:
            return 0.0
        known = self.draft.at(k)
        return 0.0 if known is None else known

    def verify_seconds(self, rows: int) -> float | None:
        """Seconds of a verify of ``rows``; None where nothing is known."""
        return self.verify.at(rows)


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
