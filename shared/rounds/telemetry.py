"""What a model service shows of itself: a span and a few numbers for each round.

Called after the answer has gone out, from the stream's own thread: while the coordinator
works on the answer, this one has nothing else to do.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from opentelemetry.trace import SpanKind

from outrider.shared.core.errors import RefusalCode
from outrider.shared.core.model_facts import EngineInfo
from outrider.shared.core.types import RoundResult
from outrider.shared.telemetry.setup import Telemetry
from outrider.shared.telemetry.spans import parse_traceparent

log = logging.getLogger(__name__)


class ServiceTelemetry:
    """Sees the rounds of one service; ``name`` is "draft" or "verify", and that of its spans."""

    def __init__(self, telemetry: Telemetry, name: str, info: Callable[[], EngineInfo]) -> None:
        """``info`` is ``Engine.info``, asked when metrics are collected."""
        self._spans = telemetry.spans
        self._name = name
        self._metering = telemetry.metering
        self.enabled = telemetry.metering or telemetry.tracing
        self._offset = time.time_ns() - time.perf_counter_ns()
        if not telemetry.metering:
            return
        instruments = telemetry.instruments
        self._seconds = instruments.histogram("outrider.service.round.duration")
        self._model = instruments.counter("outrider.service.model.time")
        self._rows = instruments.counter("outrider.service.rows")
        self._cut = instruments.counter("outrider.service.tokens.cut")
        self._refusals = instruments.counter("outrider.service.refusals")
        gauges: dict[str, Callable[[EngineInfo], float]] = {
            "outrider.service.sequences": lambda one: one.sequences,
            "outrider.service.sequences.cached": lambda one: one.cached,
            "outrider.arena.tokens.limit": lambda one: one.arena_tokens,
            "outrider.arena.tokens.used": lambda one: one.arena_tokens_used,
            "outrider.arena.tokens.cached": lambda one: one.arena_tokens_cached,
            "outrider.arena.tokens.largest_free": lambda one: one.arena_tokens_largest_free,
            "outrider.arena.occupancy": occupancy,
            "outrider.arena.fragmentation": fragmentation,
        }
        for metric, read in gauges.items():
            instruments.observe(metric, lambda read=read: [(read(info()), {})])  # type: ignore[misc]

    def round(self, message: Any, items: Sequence[Any], result: RoundResult[Any],
              arrived: float, answered: float) -> None:  # fmt: skip
        """One round message was answered; times are of ``time.perf_counter``."""
        try:
            if self._metering:
                self._seconds.record(answered - arrived)
                self._model.add(result.model_seconds)
                self._rows.add(result.rows)
                self._cut.add(result.cut)
                for refusal in result.refusals:
                    self._refusals.add(1, RefusalCode(refusal.code).name.lower())
            if message.traceparent:
                self._span(message, items, result, arrived, answered)
        except Exception:
            # Seeing must not disturb what is seen.
            log.exception("telemetry failed")

    def _span(self, message: Any, items: Sequence[Any], result: RoundResult[Any],
              arrived: float, answered: float) -> None:  # fmt: skip
        parent = parse_traceparent(message.traceparent)
        if parent is None or not parent.sampled:
            return
        attributes: dict[str, Any] = {
            "outrider.round": message.round,
            "outrider.batch_size": len(items),
            "outrider.rows": result.rows,
            "outrider.device_time": result.model_seconds,
            "outrider.refusals": len(result.refusals),
        }
        name = self._name
        if name == "draft":
            k = max((item.k for item in items), default=0)
            name = "draft" if k else "catch_up"
            if k:
                attributes["outrider.k"] = k
                attributes["outrider.proposed"] = sum(len(one.tokens) for one in result.answers)
        else:
            attributes["outrider.proposed"] = sum(len(item.proposal) for item in items)
            attributes["outrider.accepted"] = sum(one.num_accepted for one in result.answers)
        self._spans.finish(
            name,
            self._spans.child(parent),
            parent,
            self._offset + int(arrived * 1e9),
            self._offset + int(answered * 1e9),
            attributes,
            remote_parent=True,
            kind=SpanKind.SERVER,
        )


def occupancy(info: EngineInfo) -> float:
    """Share of the arena that live sequences have reserved."""
    return info.arena_tokens_used / info.arena_tokens if info.arena_tokens else 0.0


def fragmentation(info: EngineInfo) -> float:
    """Share of the free slots that the largest free extent does not have."""
    free = info.arena_tokens - info.arena_tokens_used - info.arena_tokens_cached
    return 1.0 - info.arena_tokens_largest_free / free if free > 0 else 0.0
