"""``paced:step=8ms,row=0.1ms``: what a paced model is, written in place of a path."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from outrider.shared.core.errors import ConfigError

PREFIX = "paced:"
MOST_VOCABULARY = 1 << 24
"""Ids are kept as float32, which holds whole numbers up to here."""
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True, slots=True)
class PacedSpec:
    """How long a forward takes, and how often the model is right.

    A forward of n rows takes ``step + row * max(0, n - free)`` seconds. Base and draft are a pair
    where ``vocab`` and ``seed`` are the same.
    """

    step: float
    row: float = 0.0
    free: int = 0
    """Rows that cost nothing beside the step."""
    agreement: tuple[float, ...] = (1.0,)
    """How likely each token is the base's own; a sequence has the one at the place of its first
    token, modulo their number."""
    vocab: int = 512
    seed: int = 0

    def seconds(self, rows: int) -> float:
        """Of a forward of so many rows, all sequences together."""
        return self.step + self.row * max(0, rows - self.free)


def parse(path: str) -> PacedSpec | None:
    """The model that a path asks for; None where it asks for another kind.

    Raises ``ConfigError`` naming the field, its value and what is allowed.
    """
    if not path.startswith(PREFIX):
        return None
    given: dict[str, Any] = {}
    for part in path.removeprefix(PREFIX).split(","):
        name, _, text = part.partition("=")
        if name not in _READ:
            raise ConfigError(f"path: {path}: {part!r}; must be of {', '.join(_READ)}")
        if name in given:
            raise ConfigError(f"path: {path}: {name} is given twice")
        read, allowed = _READ[name]
        try:
            given[name] = read(text)
        except ValueError:
            raise ConfigError(f"path: {path}: {name}: got {text!r}; must be {allowed}") from None
    if "step" not in given:
        raise ConfigError(f"path: {path}: step is missing: seconds of a forward, such as step=8ms")
    return PacedSpec(**given)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(.+?)(us|ms|s)", text)
    if match is None:
        raise ValueError
    seconds = float(match[1]) * _UNITS[match[2]]
    if not 0 <= seconds < 60:
        raise ValueError
    return seconds


def _shares(text: str) -> tuple[float, ...]:
    shares = tuple(float(part) for part in text.split("/"))
    if not all(0 <= share <= 1 for share in shares):
        raise ValueError
    return shares


def _whole(least: int, most: float = math.inf) -> Callable[[str], int]:
    def read(text: str) -> int:
        number = int(text)
        if not least <= number <= most:
            raise ValueError
        return number

    return read


_TIME = "a time below a minute with its unit: us, ms or s"
_READ: dict[str, tuple[Callable[[str], Any], str]] = {
    "step": (_seconds, _TIME),
    "row": (_seconds, _TIME),
    "free": (_whole(0), "a whole number >= 0"),
    "agreement": (_shares, "numbers in 0..1, separated by /"),
    "vocab": (_whole(2, MOST_VOCABULARY), f"a whole number in 2..{MOST_VOCABULARY}"),
    "seed": (_whole(0, (1 << 63) - 1), "a whole number in 0..2^63-1"),
}
assert list(_READ) == [one.name for one in fields(PacedSpec)]
