"""How far a match may be trusted: learnt from how proposals after matches of its length fared."""

from __future__ import annotations

from collections.abc import Sequence

FLOOR = 0.15
"""A token after the first is proposed where its chance to be accepted is this high at least."""
PRIOR = (0.3, 0.5, 0.7, 0.85, 0.9, 0.95)
"""Chance that a token is accepted, given that those before it were, after matches of 1, 2-3, 4-7,
8-15, 16-31 and more tokens, as long as nothing was seen."""
BELIEF = 6.0
"""Tries that the prior counts as."""
KEEP = 0.97
"""What a try counts for after one more of its class."""
MOST = 64
"""Tokens that are proposed however sure they are."""


class Trust:
    """One sequence's table: of each class of match lengths, how often tokens were accepted."""

    __slots__ = ("_hits", "_pending", "_tries")

    def __init__(self) -> None:
        self._hits = [BELIEF * prior for prior in PRIOR]
        self._tries = [BELIEF] * len(PRIOR)
        self._pending: tuple[int, int, tuple[int, ...]] | None = None

    def tokens(self, match_len: int) -> int:
        """Tokens worth proposing after a match of so many: one at least, or nothing more would be
        learnt."""
        place = _place(match_len)
        rate = self._hits[place] / self._tries[place]
        count, chance = 1, rate * rate
        while chance >= FLOOR and count < MOST:
            count, chance = count + 1, chance * rate
        return count

    def proposed(self, match_len: int, committed_len: int, tokens: Sequence[int]) -> None:
        """Notes a proposal for a log of ``committed_len`` tokens, to be judged by what follows."""
        self._pending = (_place(match_len), committed_len, tuple(tokens)) if tokens else None

    def learn(self, log: Sequence[int]) -> None:
        """Judges the last proposal by the log, once that has gone on."""
        if self._pending is None or len(log) <= self._pending[1]:
            return
        place, begin, tokens = self._pending
        self._pending = None
        followed = log[begin : begin + len(tokens)]
        hits = 0
        while hits < len(followed) and followed[hits] == tokens[hits]:
            hits += 1
        tries = min(hits + 1, len(followed))
        keep = KEEP**tries
        self._hits[place] = self._hits[place] * keep + hits
        self._tries[place] = self._tries[place] * keep + tries


def _place(match_len: int) -> int:
    """The class of a match length >= 1."""
    return min(match_len.bit_length(), len(PRIOR)) - 1
