"""Readers of flag values, for ``argparse``'s ``type``: they say what was given and is allowed."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

ValueT = TypeVar("ValueT")


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """Reads a whole number in ``low..high``."""
    span = f">= {low}" if high is None else f"from {low} to {high}"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"got {text!r}; must be a whole number {span}")
        return value

    return read


def number(
    low: float, high: float, *, low_open: bool = False, high_open: bool = False
) -> Callable[[str], float]:
    """Reads a finite number between ``low`` and ``high``; an open end excludes its bound."""
    span = f"{'>' if low_open else '>='} {low:g}"
    if math.isfinite(high):
        span += f" and {'<' if high_open else '<='} {high:g}"

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        good = math.isfinite(value) and low <= value <= high
        if not good or (low_open and value == low) or (high_open and value == high):
            raise argparse.ArgumentTypeError(f"got {text!r}; must be a number {span}")
        return value

    return read


def several(read: Callable[[str], ValueT]) -> Callable[[str], list[ValueT]]:
    """Reads values separated by commas, each by ``read``."""
    return lambda text: [read(part) for part in text.split(",")]
