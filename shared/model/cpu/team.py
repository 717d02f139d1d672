"""How many threads run the next forward, while others come and go on the same cores.

Threads of a team meet after every step. Where another program has one of their cores, all wait
until the system gives it back, milliseconds for a step of microseconds: then a smaller team is
faster by far. So the size is chosen by what forwards take: now and then one is run by half or
twice as many, seldom where that lost, often where forwards have become slow. It changes no result.
"""

from __future__ import annotations

MOST_ROWS = 32
"""Forwards of more rows (prompts) say nothing about a step."""
OFTEN, SELDOM = 16, 2048
"""Forwards between two tries."""
SMALLER = 256
"""The most between two tries where a smaller team is in use: others may be gone again."""
TRIES = 3
"""Forwards of a try."""
SLOW = 1.3
"""A mean slowdown from which on it is tried often."""
BETTER = 0.9
"""Another size must take so much of the time."""
_RECENT = 0.2
_FADE = 1.0005


def sizes_below(largest: int) -> list[int]:
    """``largest``, half of it, and so on down to one."""
    sizes = [largest]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


class Team:
    """Chooses among ``largest`` threads, half as many, and so on down to one."""

    def __init__(self, largest: int, first: int | None = None) -> None:
        """``first``: the size to begin with, one of ``sizes_below(largest)``; none: the largest."""
        self._sizes = sizes_below(largest)
        self._home = self._sizes.index(largest if first is None else first)
        self._place = self._home
        # By kind the least that a forward took, by any size; it fades, since forwards
        # become longer with the context. By size the mean of times over that least.
        self._least: dict[int, float] = {}
        self._slowdown: dict[int, float] = {}
        self._pause = OFTEN
        self._left = OFTEN
        self._tried: int | None = None
        self._up = False

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
        if len(self._sizes) == 1 or rows > MOST_ROWS:
            return self.size
        if self._left > 0:
            return self.size
        if self._tried is None:
            self._tried = self._other()
        return self._sizes[self._tried]

    def took(self, rows: int, size: int, seconds: float) -> None:
        """Takes note of what a forward by ``size`` threads took."""
        if len(self._sizes) == 1 or rows > MOST_ROWS:
            return
        least = min(seconds, self._least.get(rows, seconds) * _FADE)
        self._least[rows] = least
        slowdown = seconds / least
        before = self._slowdown.get(size, slowdown)
        self._slowdown[size] = before + _RECENT * (slowdown - before)
        self._left -= 1
        own = self._slowdown.get(self.size, 1.0)
        if self._tried is None:
            if own > SLOW:
                self._pause = OFTEN
                self._left = min(self._left, OFTEN)
            return
        if self._left > -TRIES:
            return
        if self._slowdown[self._sizes[self._tried]] < BETTER * own:
            self._place = self._tried
            self._pause = OFTEN
        else:
            self._pause = min(2 * self._pause, SMALLER if self._place > self._home else SELDOM)
        self._tried = None
        self._left = self._pause

    def _other(self) -> int:
        """The place of the neighbour to try: smaller and larger ones in turn."""
        self._up = not self._up
        down, up = self._place + 1, self._place - 1
        wanted = up if self._up else down
        place = wanted if 0 <= wanted < len(self._sizes) else self._place * 2 - wanted
        # What is remembered of it is from another time.
        self._slowdown.pop(self._sizes[place], None)
        return place
