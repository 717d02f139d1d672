"""What a round costs, learnt from the rounds that ran. Pure Python.

A service's time for one batch size is a curve over "how much was asked" (draft: K; verify:
rows). Measured points are kept as the median of their last few samples, so that one pause of
the machine changes nothing. Between points the curve is a straight line. Beyond them the guess
is on the low side: an untried amount must look worth trying, and one try corrects it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque

SAMPLES = 5
"""Samples kept per point."""


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
