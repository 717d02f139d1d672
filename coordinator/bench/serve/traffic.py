"""The requests of one level: what they ask for, and when they arrive.

All of it follows from the seed. Levels have the same lengths and the same arrivals but for the
rate's scale; random prompts differ between them, so that no server finds a prompt of an earlier
level in a cache.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outrider.coordinator.bench.serve.lengths import Lengths
from outrider.coordinator.bench.token_ids import COMMON_IDS
from outrider.shared import pair
from outrider.shared.core.errors import ConfigError, InvalidRequest


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """``prompt`` is text or token ids; ``at``: seconds after the level's begin."""

    prompt: str | tuple[int, ...]
    max_new_tokens: int
    at: float | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """How requests arrive: ``rate`` a second, ``concurrency`` at once, or as a file says."""

    rate: float | None = None
    concurrency: int | None = None

    def __str__(self) -> str:
        if self.rate is not None:
            return f"{self.rate:g}/s"
        return "file's times" if self.concurrency is None else f"{self.concurrency} at once"


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Seconds at which requests arrive: a Poisson process of ``rate`` a second, without end."""
    source = random.Random(f"{seed} arrivals")
    now = 0.0
    while True:
        now += source.expovariate(1.0) / rate
        yield now


def drawn_requests(
    count: int, prompts: Lengths | None, outputs: Lengths, *, seed: int, level: int
) -> list[PlannedRequest]:
    """``count`` requests with lengths drawn from ``prompts`` and ``outputs``.

    A prompt is random token ids; with ``prompts`` None held-out code of the bundled pair, in the
    same order at every level and again from the start after the last.
    """
    sizes = random.Random(f"{seed} lengths")
    ids = random.Random(f"{seed} prompts of level {level}")
    texts = [] if prompts else [str(one["text"]) for one in pair.heldout_prompts()]
    made = []
    for index in range(count):
        prompt: str | tuple[int, ...]
        if prompts is None:
            prompt = texts[index % len(texts)]
        else:
            prompt = _random_ids(ids, prompts.draw(sizes))
        made.append(PlannedRequest(prompt, outputs.draw(sizes)))
    return made


def read_requests(path: Path, *, seed: int, level: int) -> list[PlannedRequest]:
    """The requests of a file of JSON lines, by arrival.

    A line has ``prompt`` (text) or ``prompt_tokens`` (so many random ids), ``max_new_tokens``,
    and, where all lines have it, ``at`` (seconds). Raises ``ConfigError`` for a file that can't
    be read and ``InvalidRequest`` for a line that is none.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--requests: {path} can't be read: {error}") from error
    ids = random.Random(f"{seed} prompts of level {level}")
    made = [
        _read_line(f"--requests {path}, line {number}", line, ids)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not made:
        raise ConfigError(f"--requests: {path} holds no request")
    timed = [one for one in made if one.at is not None]
    if timed and len(timed) != len(made):
        raise ConfigError(
            f"--requests: {len(timed)} of the {len(made)} lines of {path} have `at`; "
            "must be all or none"
        )
    return sorted(made, key=lambda one: one.at or 0.0)


def at_rate(requests: Sequence[PlannedRequest], rate: float, seed: int) -> list[PlannedRequest]:
    """The same requests, arriving at ``rate`` a second."""
    return [
        PlannedRequest(one.prompt, one.max_new_tokens, at)
        for one, at in zip(requests, arrivals(rate, seed), strict=False)
    ]


_FIELDS = ("prompt", "prompt_tokens", "max_new_tokens", "at")


def _read_line(where: str, line: str, ids: random.Random) -> PlannedRequest:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InvalidRequest(where, line, "a JSON object")
    for name in found.keys() - set(_FIELDS):
        raise InvalidRequest(where, name, f"of the fields {', '.join(_FIELDS)}")
    text, tokens, at = found.get("prompt"), found.get("prompt_tokens"), found.get("at")
    if (text is None) == (tokens is None):
        raise InvalidRequest(where, line, "with one of prompt and prompt_tokens")
    if text is not None and not (isinstance(text, str) and text):
        raise InvalidRequest(f"{where}: prompt", text, "text of at least one character")
    if at is not None and not (_is_number(at) and 0 <= at < float("inf")):
        raise InvalidRequest(f"{where}: at", at, "seconds >= 0")
    prompt = text if text is not None else _random_ids(ids, _count(where, found, "prompt_tokens"))
    return PlannedRequest(prompt, _count(where, found, "max_new_tokens"), at)


def _count(where: str, found: dict[str, Any], name: str) -> int:
    value = found.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidRequest(f"{where}: {name}", value, "a whole number >= 1")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _random_ids(source: random.Random, count: int) -> tuple[int, ...]:
    return tuple(source.choices(COMMON_IDS, k=count))
