"""Where a text ends: stop tokens, the token limit, and how an end is told.

The end is a function of the tokens alone, never of how they were cut into rounds.
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
