"""Sampling parameters: each is declared once, beside its field of ``types.Decoding``.

A parameter has one name: that of its field in ``Decoding``, in ``SamplingParameters`` of
generation.proto and in ``Decoding`` of speculation.proto, and, with dashes, of its flag. Flags,
the check of a request and both ways over the wire go through the declarations, in their order.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outrider.shared.core.errors import InvalidRequest

INT32, UINT64 = 2**31 - 1, 2**64 - 1
"""The largest numbers that fields of these types hold."""
MAX_TOKEN_LISTS = 4096


class Kind(ABC):
    """What values a parameter has, and how messages carry them."""

    @abstractmethod
    def checked(self, field: str, sent: Any, vocab_size: int) -> Any:
        """What a client sent, as ``Decoding`` has it; raises ``InvalidRequest`` for ``field``."""

    def read(self, sent: Any) -> Any:
        """A message's field, as ``Decoding`` has it."""
        return sent

    def write(self, value: Any) -> Any:
        """What to make a message's field from."""
        return value


@dataclass(frozen=True, slots=True)
class Number(Kind):
    """A finite number between ``low`` and ``high``; an open end excludes its bound.

    ``least``: the smallest number but ``low`` itself.
    """

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    least: float | None = None

    def checked(self, field: str, sent: float, vocab_size: int) -> float:
        """See ``Kind.checked``."""
        good = math.isfinite(sent) and self.low <= sent <= self.high
        if sent == self.low:
            good &= not self.low_open
        elif self.least is not None:
            good &= sent >= self.least
        if not good or (self.high_open and sent == self.high):
            raise InvalidRequest(field, sent, self._allowed())
        return sent

    def _allowed(self) -> str:
        if self.least is not None:
            return f"{self.low:g} or in [{self.least:g}, {self.high:g}]"
        if math.isinf(self.high):
            return f"a finite number {'>' if self.low_open else '>='} {self.low:g}"
        begin, end = "(" if self.low_open else "[", ")" if self.high_open else "]"
        return f"in {begin}{self.low:g}, {self.high:g}{end}"


@dataclass(frozen=True, slots=True)
class Whole(Kind):
    """A whole number in ``low..high``."""

    low: int = 0
    high: int = INT32

    def checked(self, field: str, sent: int, vocab_size: int) -> int:
        """See ``Kind.checked``."""
        if not self.low <= sent <= self.high:
            # What a field can't hold needs no mention: nobody can have sent it.
            span = f">= {self.low}" if self.high >= INT32 else f"in [{self.low}, {self.high}]"
            raise InvalidRequest(field, sent, f"a whole number {span}")
        return sent


@dataclass(frozen=True, slots=True)
class TokenBiases(Kind):
    """A number for each of some tokens: a map in messages, sorted pairs in ``Decoding``.

    ``most``: the largest size of one.
    """

    most: float

    def checked(
        self, field: str, sent: Mapping[int, float], vocab_size: int
    ) -> tuple[tuple[int, float], ...]:
        """See ``Kind.checked``."""
        for token, bias in sent.items():
            if token >= vocab_size:
                raise InvalidRequest(f"{field}[{token}]", token, f"a token in [0, {vocab_size})")
            if not abs(bias) <= self.most:
                allowed = f"in [{-self.most:g}, {self.most:g}]"
                raise InvalidRequest(f"{field}[{token}]", bias, allowed)
        return self.read(sent)

    def read(self, sent: Mapping[int, float]) -> tuple[tuple[int, float], ...]:
        """See ``Kind.read``."""
        return tuple(sorted(sent.items()))

    def write(self, value: Sequence[tuple[int, float]]) -> dict[int, float]:
        """See ``Kind.write``."""
        return dict(value)


class TokenLists(Kind):
    """Sequences of tokens: messages with ``ids``, tuples in ``Decoding``."""

    def checked(
        self, field: str, sent: Sequence[Any], vocab_size: int
    ) -> tuple[tuple[int, ...], ...]:
        """See ``Kind.checked``; each sequence once."""
        if len(sent) > MAX_TOKEN_LISTS:
            most = f"at most {MAX_TOKEN_LISTS} sequences"
            raise InvalidRequest(field, f"{len(sent)} sequences", most)
        for index, one in enumerate(sent):
            if not one.ids:
                raise InvalidRequest(f"{field}[{index}].ids", [], "at least one token")
            if max(one.ids) >= vocab_size:
                allowed = f"tokens in [0, {vocab_size})"
                raise InvalidRequest(f"{field}[{index}].ids", max(one.ids), allowed)
        return tuple(dict.fromkeys(self.read(sent)))

    def read(self, sent: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
        """See ``Kind.read``."""
        return tuple(tuple(one.ids) for one in sent)

    def write(self, value: Sequence[Sequence[int]]) -> list[dict[str, Sequence[int]]]:
        """See ``Kind.write``."""
        return [{"ids": ids} for ids in value]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One sampling parameter."""

    kind: Kind
    help: str


def parameter(default: Any, kind: Kind, *, help: str) -> Any:
    """Declares a field of ``Decoding`` as a parameter of a request, unset being ``default``."""
    return dataclasses.field(default=default, metadata={"parameter": Parameter(kind, help)})


def declared(owner: Any) -> dict[str, Parameter]:
    """The parameters among the fields of a dataclass, by name."""
    found = {one.name: one.metadata.get("parameter") for one in dataclasses.fields(owner)}
    return {name: one for name, one in found.items() if one is not None}
