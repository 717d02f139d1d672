"""Where a text ends: stop strings across token borders, stop tokens, and the token limit.

The end is a function of the tokens alone, never of how they were cut into rounds: a stop string
is found at the first *character* that completes one, as if text came a character at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class FinishReason(IntEnum):
    """Why a sample ended; the numbers of ``outrider.v1.FinishReason``."""

    MAX_TOKENS = 1
    END_OF_SEQUENCE = 2
    STOP_STRING = 3
    STOP_TOKEN = 4
    CANCELLED = 5
    DEADLINE = 6


@dataclass(frozen=True, slots=True)
class Finish:
    """How a sample ended."""

    reason: FinishReason
    stop_string: str = ""
    stop_token_id: int | None = None


class StopStrings:
    """Finds the first stop string in a stream of text and holds back what may become one.

    ``held`` is always the longest suffix of the text so far that is a proper prefix of some stop
    string; everything before it has been released. Text may be hidden: it takes part in the
    search as any other, but is never released.
    """

    __slots__ = ("_hidden", "_longest", "_stops", "held")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._hidden: list[bool] = []  # of each character held
        self.held = ""

    def push(self, text: str, *, hidden: bool = False) -> tuple[str, str | None]:
        """Returns the text to release and the stop string that ended it, if one did."""
        if not self._stops:
            return "" if hidden else text, None
        buffer = self.held + text
        flags = [*self._hidden, *[hidden] * len(text)]
        found = self._find(buffer)
        if found is not None:
            start, stop = found
            self.held, self._hidden = "", []
            return _shown(buffer[:start], flags), stop
        cut = len(buffer) - self._hold(buffer)
        self.held, self._hidden = buffer[cut:], flags[cut:]
        return _shown(buffer[:cut], flags), None

    def ends(self, text: str, hidden: str = "") -> bool:
        """Whether a stop string is complete once ``text``, and ``hidden`` after it, have come."""
        return bool(self._stops) and self._find(self.held + text + hidden) is not None

    def flush(self) -> str:
        """What was held back, when no text comes any more."""
        shown = _shown(self.held, self._hidden)
        self.held, self._hidden = "", []
        return shown

    def _find(self, buffer: str) -> tuple[int, str] | None:
        """The match that ends first; of those that end together, the longest."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = buffer.find(stop)
            if start >= 0:
                match = (start + len(stop), start, stop)
                if best is None or match[:2] < best[:2]:
                    best = match
        return None if best is None else (best[1], best[2])

    def _hold(self, buffer: str) -> int:
        """Length of the longest suffix of ``buffer`` that begins some stop string."""
        for length in range(min(self._longest - 1, len(buffer)), 0, -1):
            suffix = buffer[-length:]
            if any(len(stop) > length and stop.startswith(suffix) for stop in self._stops):
                return length
        return 0


def _shown(text: str, hidden: Sequence[bool]) -> str:
    """The characters of ``text`` that are not hidden."""
    if not any(hidden):
        return text
    return "".join(one for one, away in zip(text, hidden, strict=False) if not away)


class TokenStops:
    """Ends a sample at an end-of-sequence token, a stop token, or the token limit."""

    __slots__ = ("_eos", "_left", "_stops", "_watched")

    def __init__(self, eos: Sequence[int], stops: Sequence[int], limit: int) -> None:
        """``eos`` is empty when end-of-sequence is ignored; ``limit`` is in tokens, >= 0."""
        self._stops = frozenset(stops)
        self._eos = frozenset(eos)
        self._watched = self._eos | self._stops
        self._left = limit

    @property
    def left(self) -> int:
        """Tokens that may still be emitted."""
        return self._left

    def push(self, tokens: Sequence[int]) -> tuple[int, Finish | None]:
        """Returns how many of ``tokens`` belong to the output, and the end if it is among them.

        A token that ends the text belongs to the output (it is counted, and sent as an id).
        """
        watched = self._watched
        candidates = () if watched.isdisjoint(tokens) else tokens[: self._left]
        for index, token in enumerate(candidates):
            if token in watched:
                self._left -= index + 1
                reason = (
                    FinishReason.STOP_TOKEN
                    if token in self._stops
                    else FinishReason.END_OF_SEQUENCE
                )
                return index + 1, Finish(reason, stop_token_id=token)
        taken = min(len(tokens), self._left)
        self._left -= taken
        return taken, None if self._left else Finish(FinishReason.MAX_TOKENS)
