"""How long prompts and answers are: a number of tokens, or a distribution of it."""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import dataclass
from typing import Protocol


class Lengths(Protocol):
    """Token counts, each at least 1. As text it is what the flag says."""

    def draw(self, source: random.Random) -> int:
        """One count."""


@dataclass(frozen=True, slots=True)
class FixedLength:
    """Always ``tokens``."""

    tokens: int

    def draw(self, source: random.Random) -> int:
        """``tokens``; draws nothing."""
        return self.tokens

    def __str__(self) -> str:
        return str(self.tokens)


@dataclass(frozen=True, slots=True)
class UniformLengths:
    """Every count from ``low`` to ``high``, both included, equally often."""

    low: int
    high: int

    def draw(self, source: random.Random) -> int:
        """One count."""
        return source.randint(self.low, self.high)

    def __str__(self) -> str:
        return f"uniform:{self.low}-{self.high}"


@dataclass(frozen=True, slots=True)
class LognormalLengths:
    """Counts whose logarithm is normal with deviation ``sigma``; ``mean`` is in tokens."""

    mean: float
    sigma: float

    def draw(self, source: random.Random) -> int:
        """One count, rounded; what rounds to 0 is 1."""
        # A lognormal's mean is exp(mu + sigma² / 2).
        mu = math.log(self.mean) - self.sigma**2 / 2
        return max(1, round(source.lognormvariate(mu, self.sigma)))

    def __str__(self) -> str:
        return f"lognormal:{self.mean:g},{self.sigma:g}"


_ALLOWED = "a number of tokens >= 1, uniform:LOW-HIGH or lognormal:MEAN,SIGMA"


def read_lengths(text: str) -> Lengths:
    """Reads a flag's value, for ``argparse``'s ``type``."""
    try:
        return _read(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; must be {_ALLOWED}") from None


def _read(text: str) -> Lengths:
    """Raises ``ValueError`` for what is none."""
    kind, colon, values = text.partition(":")
    if not colon:
        if (tokens := int(text)) >= 1:
            return FixedLength(tokens)
    elif kind == "uniform":
        low, high = (int(part) for part in values.split("-"))
        if 1 <= low <= high:
            return UniformLengths(low, high)
    elif kind == "lognormal":
        mean, sigma = (float(part) for part in values.split(","))
        if 1 <= mean < math.inf and 0 <= sigma < math.inf:
            return LognormalLengths(mean, sigma)
    raise ValueError(text)
