"""Metrics of requests, rounds and speculation, from records."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from outrider.coordinator.telemetry import phases
from outrider.coordinator.telemetry.attributes import OPERATION, PROVIDER
from outrider.coordinator.telemetry.records import ConnectionRecord, RequestRecord, RoundRecord
from outrider.shared.core.links import MESSAGES
from outrider.shared.telemetry.metrics import Instruments

WINDOW = 256
"""Rounds over which rates are shown."""

Points = Iterable[tuple[float, Mapping[str, str | int]]]


class PrefixCacheFigures(Protocol):
    """What a prefix cache counts."""

    tokens: int
    hits: int
    hit_tokens: int
    evictions: int

    def __len__(self) -> int:
        """Cached sequences."""


@dataclass(frozen=True, slots=True)
class Now:
    """How the coordinator stands at this moment."""

    running: int = 0
    waiting: int = 0
    link: str = MESSAGES
    model: str = ""
    caches: Mapping[str, PrefixCacheFigures] = field(default_factory=dict)
    """By service."""
    ceiling: Callable[[float, float], float | None] = lambda tokens, k: None
    """Tokens and mean K per round -> tokens per second that memory allows; None: not known."""


class Metering:
    """Turns records into metrics. Counters cost a dictionary update, histograms a few µs."""

    def __init__(self, instruments: Instruments, now: Callable[[], Now]) -> None:
        self._now = now
        counter, histogram = instruments.counter, instruments.histogram
        self._request_seconds = histogram("gen_ai.server.request.duration")
        self._first_token = histogram("gen_ai.server.time_to_first_token")
        self._per_token = histogram("gen_ai.server.time_per_output_token")
        self._queue = histogram("outrider.request.queue.duration")
        self._requests = counter("outrider.requests")
        self._prompt = counter("outrider.tokens.prompt")
        self._emitted = counter("outrider.tokens.emitted")
        self._round_seconds = histogram("outrider.round.duration")
        self._rounds = counter("outrider.rounds")
        self._phases = counter("outrider.round.phase.time")
        self._hidden = counter("outrider.round.hidden.time")
        self._sequences = counter("outrider.round.sequences")
        self._by_k = counter("outrider.speculation.sequences")
        self._proposed = counter("outrider.tokens.proposed")
        self._accepted = counter("outrider.tokens.accepted")
        self._wasted = counter("outrider.tokens.wasted")
        self._failovers = counter("outrider.failovers")
        self._up: dict[str, bool] = {}
        # Of each round that decoded: seconds, sequences, K summed, proposed, accepted, emitted.
        self._window: deque[tuple[float, int, int, int, int, int]] = deque(maxlen=WINDOW)
        self._last_choice: tuple[float, float] | None = None
        observe = instruments.observe
        observe("outrider.requests.running", lambda: [(self._now().running, {})])
        observe("outrider.requests.waiting", lambda: [(self._now().waiting, {})])
        observe("outrider.link.in_use", lambda: [(1, {"outrider.link": self._now().link})])
        observe("outrider.service.up", self._services)
        caches: dict[str, Callable[[PrefixCacheFigures], int]] = {
            "outrider.prefix_cache.sequences": len,
            "outrider.prefix_cache.tokens": lambda one: one.tokens,
            "outrider.prefix_cache.hits": lambda one: one.hits,
            "outrider.prefix_cache.hit.tokens": lambda one: one.hit_tokens,
            "outrider.prefix_cache.evictions": lambda one: one.evictions,
        }
        for name, read in caches.items():
            observe(name, lambda read=read: self._cached(read))  # type: ignore[misc]
        observe("outrider.speculation.length", lambda: self._over_window(2, 1))
        observe("outrider.speculation.foreseen.rate", self._foreseen)
        observe("outrider.acceptance.rate", lambda: self._over_window(4, 3))
        observe("outrider.accepted.length.mean", lambda: self._over_window(5, 1))
        observe("outrider.ceiling.share", self._ceiling_share)

    def round(self, record: RoundRecord, parts: phases.Phases, mode: str) -> None:
        """Counts one round."""
        self._round_seconds.record(parts.total, {"outrider.round.mode": mode})
        self._rounds.add(1, mode)
        self._sequences.add(len(record.sequences), mode)
        for name in phases.NAMES:
            self._phases.add(getattr(parts, name), name)
        if parts.hidden:
            self._hidden.add(parts.hidden)
        decoded = ks = proposed = accepted = emitted = 0
        for one in record.sequences:
            if not one.emitted:
                continue
            decoded += 1
            ks += one.k
            proposed += one.proposed
            accepted += one.accepted
            emitted += one.emitted
            self._by_k.add(1, one.k)
            for position in range(one.proposed):
                self._proposed.add(1, position + 1)
                if position < one.accepted:
                    self._accepted.add(1, position + 1)
            last = "base"
            if one.proposed:
                last = "bonus" if one.accepted == one.proposed else "corrected"
            self._emitted.add(1, last)
        if accepted:
            self._emitted.add(accepted, "accepted")
        if proposed > accepted:
            self._wasted.add(proposed - accepted)
        if record.k_reason:
            self._last_choice = record.foreseen_rate, record.foreseen_plain_rate
        if decoded:
            self._window.append((parts.total, decoded, ks, proposed, accepted, emitted))

    def request(self, record: RequestRecord) -> None:
        """Counts one sample that is over."""
        attributes = {
            "gen_ai.operation.name": OPERATION,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": self._now().model,
        }
        self._requests.add(1, record.reason.lower())
        self._prompt.add(record.prompt_tokens)
        end, first = record.finished_ns, record.first_token_ns
        seconds = (end - record.arrived_ns) / 1e9
        if record.error:
            self._request_seconds.record(seconds, {**attributes, "error.type": record.reason})
        else:
            self._request_seconds.record(seconds, attributes)
        if record.admitted_ns:
            self._queue.record((record.admitted_ns - record.arrived_ns) / 1e9)
        if first:
            self._first_token.record((first - record.arrived_ns) / 1e9, attributes)
            if record.completion_tokens > 1:
                per_token = (end - first) / 1e9 / (record.completion_tokens - 1)
                self._per_token.record(per_token, attributes)

    def connection(self, record: ConnectionRecord) -> None:
        """Notes a service that was lost or came back."""
        if self._up.get(record.service, True) and not record.up:
            self._failovers.add(1, record.service)
        self._up[record.service] = record.up

    def attached(self, services: Mapping[str, bool]) -> None:
        """Which services there are at the start, and whether each is up."""
        self._up = dict(services)
        for service in services:
            self._failovers.add(0, service)

    def _services(self) -> Points:
        return [(int(up), {"outrider.service": name}) for name, up in self._up.items()]

    def _cached(self, read: Callable[[PrefixCacheFigures], int]) -> Points:
        return [(read(one), {"outrider.service": name}) for name, one in self._now().caches.items()]

    def _foreseen(self) -> Points:
        if self._last_choice is None:
            return []
        ways = ("chosen", "plain")
        return [
            (rate, {"outrider.choice": way})
            for way, rate in zip(ways, self._last_choice, strict=True)
        ]

    def _over_window(self, numerator: int, denominator: int) -> Points:
        window = tuple(self._window)
        below = sum(row[denominator] for row in window)
        return [(sum(row[numerator] for row in window) / below, {})] if below else []

    def _ceiling_share(self) -> Points:
        window = tuple(self._window)
        seconds = sum(row[0] for row in window)
        sequences = sum(row[1] for row in window)
        if not seconds:
            return []
        tokens = sum(row[5] for row in window)
        k = sum(row[2] for row in window) / sequences
        ceiling = self._now().ceiling(tokens / len(window), k)
        return [] if not ceiling else [(tokens / seconds / ceiling, {})]
