"""Percentiles, one rule for all figures."""

from __future__ import annotations

import math
from collections.abc import Sequence


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value at ``share`` (0 to 1) of ascending ``ordered``: between the two that are closest
    in rank, in proportion, the lowest being at 0 and the highest at 1. Not for none."""
    place = (len(ordered) - 1) * share
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
