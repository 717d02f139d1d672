"""Stop strings in a stream of text, across the borders of tokens.

A stop string is found at the first *character* that completes one, as if text came a character
at a time.
"""

from __future__ import annotations

from collections.abc import Container, Sequence


class StopStrings:
    """Finds the first stop string in a stream of text and holds back what may become one.

    The text is read in two ways: as it is sent, and as it is written with its special tokens
    (``push_special``), which are never sent. A stop string counts in both; one that speaks of a
    special token means the whole of it.

    ``held`` is the shortest end of the text to send in which some stop string may have begun;
    everything before it has been released.
    """

    __slots__ = ("_stops", "_written", "held")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self.held = ""
        # None while the two ways of reading see the same.
        self._written: _Written | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Returns the text to release and the stop string that ended it, if one did."""
        if not self._stops:
            return text, None
        released = ""
        while self._written is not None and text:
            more, stop = self._step(self._written, text[0])
            released += more
            if stop is not None:
                return released, stop
            text = text[1:]
        if self._written is not None:
            return released, None
        buffer = self.held + text
        found = self._find(buffer)
        if found is not None:
            start, stop = found
            self.held = ""
            return released + buffer[:start], stop
        return released + self._keep(buffer, self._begun(buffer)), None

    def push_special(self, token: str) -> tuple[str, str | None]:
        """The same for a special token, as it is written."""
        if not self._stops:
            return "", None
        if self._written is None:
            self._written = _Written(self.held)
        return self._step(self._written, token, special=True)

    def flush(self) -> str:
        """What was held back, when no text comes any more."""
        held, self.held, self._written = self.held, "", None
        return held

    def completes(self, pieces: Sequence[tuple[str, bool]], *, after_held: bool) -> bool:
        """Whether ``pieces`` complete a stop string; takes nothing in.

        A piece is text, or a special token where its second part is true. ``after_held``: they
        come next; otherwise there is more text before them.
        """
        trial = StopStrings(self._stops)
        if after_held:
            trial.held = self.held
            trial._written = None if self._written is None else self._written.copy()
        for piece, special in pieces:
            _, stop = trial.push_special(piece) if special else trial.push(piece)
            if stop is not None:
                return True
        return False

    def _step(
        self, written: _Written, one: str, *, special: bool = False
    ) -> tuple[str, str | None]:
        """Takes in one character, or one special token."""
        written.push(one, special=special)
        buffer = self.held if special else self.held + one
        # How much of the text to send belongs to each stop string that is complete.
        ended = {stop: sent for stop in self._stops if (sent := written.ending(stop)) is not None}
        if not special:
            ended |= {stop: len(stop) for stop in self._stops if buffer.endswith(stop)}
        if ended:
            stop = max(ended, key=len)
            self.held, self._written = "", None
            return buffer[: len(buffer) - ended[stop]], stop
        begun = max(self._begun(buffer), written.forget(self._stops))
        released = self._keep(buffer, begun)
        if written.is_text(self.held):
            self._written = None
        return released, None

    def _keep(self, buffer: str, length: int) -> str:
        """Holds back the last ``length`` characters of ``buffer``; returns the others."""
        cut = len(buffer) - length
        self.held = buffer[cut:]
        return buffer[:cut]

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

    def _begun(self, buffer: str) -> int:
        """Length of the longest suffix of ``buffer`` that begins some stop string."""
        return max(_begun(buffer, stop) for stop in self._stops)


class _Written:
    """The end of the text with its special tokens in which a stop string may have begun."""

    __slots__ = ("_parts",)

    def __init__(self, text: str) -> None:
        # Characters and special tokens; the second part is true for what is special.
        self._parts = [(one, False) for one in text]

    def copy(self) -> _Written:
        """Another of the same text."""
        other = _Written("")
        other._parts = [*self._parts]
        return other

    def push(self, one: str, *, special: bool) -> None:
        """Takes in one character, or one special token."""
        self._parts.append((one, special))

    def ending(self, stop: str) -> int | None:
        """How much of the text to send ``stop`` takes at the end; None: it is not there."""
        text, borders = self._text()
        start = borders.get(len(text) - len(stop)) if text.endswith(stop) else None
        return None if start is None else self._sent(start)

    def forget(self, stops: Sequence[str]) -> int:
        """Keeps what may become one of ``stops``; returns how much of the text to send that is."""
        text, borders = self._text()
        begun = max(_begun(text, stop, borders) for stop in stops)
        del self._parts[: borders[len(text) - begun]]
        return self._sent(0)

    def is_text(self, text: str) -> bool:
        """Whether it is ``text`` and has no special tokens."""
        return self._parts == [(one, False) for one in text]

    def _sent(self, start: int) -> int:
        return sum(not special for _, special in self._parts[start:])

    def _text(self) -> tuple[str, dict[int, int]]:
        """The text, and by where it begins in that the index of each part (and of the end)."""
        text, borders = "", {}
        for index, (one, _) in enumerate(self._parts):
            borders[len(text)] = index
            text += one
        borders[len(text)] = len(self._parts)
        return text, borders


def _begun(text: str, stop: str, borders: Container[int] | None = None) -> int:
    """Length of the longest suffix of ``text`` that begins ``stop`` and is not all of it.

    It begins at one of ``borders`` where they are given.
    """
    start = max(0, len(text) - len(stop) + 1)
    while (start := text.find(stop[0], start)) >= 0:
        if (borders is None or start in borders) and stop.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0
