"""How many threads run the next forward, while others come and go on the same cores.

Threads of a team meet after every step. Where another program has one of their cores, all wait
until the system gives it back, milliseconds for a step of microseconds: then a smaller team is
faster by far. So when forwards have become slow, a smaller team is tried for a few of them, and
after a while the larger one again. Medians decide, and a change must be worth it: what draft, base
and coordinator do to each other on few cores is noise that a team must not run after. The size
changes no result.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from statistics import median

log = logging.getLogger(__name__)

MOST_ROWS = 32
"""Forwards of more rows (prompts) say nothing about a step."""
RECENT = 16
"""Forwards that tell how the team in use does."""
TRIES = 8
"""Forwards of a try."""
SLOW = 2.0
"""Times the least that was seen, from which on a smaller team is tried."""
BACK, MOST_BACK = 64, 2048
"""Forwards until the larger team is tried again; twice as many after each try that failed."""
SELDOM = 4096
"""Forwards until a larger one than at first is tried."""
WORTH = 150e-6
"""Seconds that a larger team must save: waking more threads, and holding their cores while draft,
base and coordinator want them too, costs the others about as much."""
_DOWN, _UP = 0.7, 0.9
"""What a try must take of the time: by a smaller team, by a larger one."""
_FADE = 1.0005


class Team:
    """Chooses among ``largest`` threads, half as many, and so on down to one."""

    def __init__(self, largest: int, first: int | None = None) -> None:
        """``first``: the size to begin with, one of ``sizes_below(largest)``; none: the largest."""
        self._sizes = sizes_below(largest)
        self._home = self._sizes.index(largest if first is None else first)
        self._place = self._home
        # By kind the least that a forward took, by any size; it fades, since forwards become
        # longer with the context. What is compared are times over it.
        self._least: dict[int, float] = {}
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)
        self._tried: int | None = None
        self._trial: list[tuple[int, float]] = []
        self._pause = BACK
        self._left = SELDOM

    @property
    def usual(self) -> int:
        """The size that it began with."""
        return self._sizes[self._home]

    @property
    def size(self) -> int:
        """The size that is in use."""
        return self._sizes[self._place]

    def next(self, rows: int) -> int:
        """Threads for a forward of so many rows, or of another kind, by a negative number."""
        if self._tried is None or rows > MOST_ROWS:
            return self.size
        return self._sizes[self._tried]

    def took(self, rows: int, size: int, seconds: float) -> None:
        """Takes note of what a forward by ``size`` threads took."""
        if len(self._sizes) == 1 or rows > MOST_ROWS:
            return
        self._least[rows] = min(seconds, self._least.get(rows, seconds) * _FADE)
        if self._tried is not None:
            self._trial.append((rows, seconds))
            if len(self._trial) == TRIES:
                self._decide()
            return
        self._recent.append((rows, seconds))
        self._left -= 1
        if self._left <= 0 and self._place > 0:
            self._try(self._place - 1)
        elif self._left % RECENT == 0 and len(self._recent) == RECENT:
            smaller = self._place + 1
            if smaller < len(self._sizes) and self._slowdown(self._recent) > SLOW:
                self._try(smaller)

    def _slowdown(self, forwards: Iterable[tuple[int, float]]) -> float:
        return median(seconds / self._least[kind] for kind, seconds in forwards)

    def _try(self, place: int) -> None:
        self._tried, self._trial = place, []

    def _decide(self) -> None:
        place, self._tried = self._tried, None
        assert place is not None
        before, now = self._slowdown(self._recent), self._slowdown(self._trial)
        if place > self._place:
            changed = now < _DOWN * before
        else:
            unit = median(self._least[kind] for kind, _ in self._trial)
            changed = now < _UP * before and (before - now) * unit > WORTH
        if changed:
            log.debug("%d threads run forwards, in place of %d", self._sizes[place], self.size)
            self._place = place
            self._recent.clear()
        # Each time that the larger team is left or fails, it is left alone for longer.
        if changed == (place > self._home):
            self._pause = min(2 * self._pause, MOST_BACK)
        self._left = self._pause if self._place > self._home else SELDOM


def sizes_below(largest: int) -> list[int]:
    """``largest``, half of it, and so on down to one."""
    sizes = [largest]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes
