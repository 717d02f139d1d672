"""Where a text ends at a stop string, found by looking at all of it after every character."""

from __future__ import annotations

from collections.abc import Sequence

Part = tuple[str, bool]
"""A character, or a special token where the second is true."""


def parts_of(text: str) -> list[Part]:
    """``text`` by characters."""
    return [(one, False) for one in text]


def sent(parts: Sequence[Part]) -> str:
    """The text that a client gets: without special tokens."""
    return "".join(one for one, special in parts if not special)


def naive(parts: Sequence[Part], stops: Sequence[str]) -> tuple[str, str | None]:
    """The text before the stop that is complete first, and that stop; longest on a tie.

    A stop is complete where the text to send ends with it, or where it is some last parts.
    """
    longest = max(map(len, stops), default=0)
    for end in range(1, len(parts) + 1):
        text = sent(parts[:end])
        complete = []
        for stop in stops:
            if not parts[end - 1][1] and text.endswith(stop):
                complete.append((len(stop), len(stop), stop))
            complete += [
                (len(stop), len(sent(parts[start:end])), stop)
                for start in range(max(0, end - longest), end)
                if _written(parts[start:end]) == stop
            ]
        if complete:
            _, length, stop = max(complete)
            return text[: len(text) - length], stop
    return sent(parts), None


def may_become_stop(parts: Sequence[Part], stops: Sequence[str]) -> int:
    """Length of the longest end of the text to send in which a stop may have begun."""
    text, longest = sent(parts), max(map(len, stops), default=0)
    lengths = [
        n for n in range(min(longest, len(text)) + 1) if _begins(text[len(text) - n :], stops)
    ]
    lengths += [
        len(sent(parts[start:]))
        for start in range(max(0, len(parts) - longest), len(parts))
        if _begins(_written(parts[start:]), stops)
    ]
    return max(lengths)


def _written(parts: Sequence[Part]) -> str:
    return "".join(one for one, _ in parts)


def _begins(text: str, stops: Sequence[str]) -> bool:
    return not text or any(stop.startswith(text) for stop in stops)
