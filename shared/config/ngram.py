"""The name of the draft without a model: ``ngram``, or ``ngram:N`` with the least match."""

from __future__ import annotations

import re
from dataclasses import dataclass

LEAST_MATCH, MOST_MATCH = 1, 64
ALLOWED = f"ngram or ngram:N with N (tokens of the shortest match) from 1 to {MOST_MATCH}"


@dataclass(frozen=True, slots=True)
class NgramName:
    """What such a name asks for."""

    least_match: int
    """Tokens of a match, at least, that is proposed from."""


def is_ngram(path: str) -> bool:
    """Whether ``path`` is meant to be such a name; a folder that is called so is ``./ngram``."""
    return path == "ngram" or path.startswith("ngram:")


def read_name(path: str) -> NgramName | None:
    """What ``path`` asks for; None where it is none of these names or says nothing allowed."""
    found = re.fullmatch(r"ngram(?::(\d{1,9}))?", path)
    if found is None:
        return None
    least = LEAST_MATCH if found[1] is None else int(found[1])
    return NgramName(least) if 1 <= least <= MOST_MATCH else None
