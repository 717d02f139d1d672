"""Spans that are made after the fact: ids first, the finished span when there is time for it.

The SDK's own ``start_span``/``end`` costs more than twenty microseconds and must run where
the work runs. Here a span's identity is drawn when its context has to travel (two random
numbers), and the span itself is built later, elsewhere, from timestamps that were taken
anyway. What comes out are the SDK's ``ReadableSpan`` objects, so that every span processor
and exporter takes them.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.sampling import Decision, Sampler
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

SAMPLED = TraceFlags(TraceFlags.SAMPLED)
UNSAMPLED = TraceFlags(TraceFlags.DEFAULT)
_UNSET = Status(StatusCode.UNSET)
_PROPAGATOR = TraceContextTextMapPropagator()


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Who a span is: 16-byte trace id, 8-byte span id, and whether the trace is kept."""

    trace_id: int
    span_id: int
    sampled: bool

    @property
    def traceparent(self) -> str:
        """As W3C Trace Context, version 00."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{'01' if self.sampled else '00'}"

    @property
    def trace_hex(self) -> str:
        """The trace id as tools show it."""
        return f"{self.trace_id:032x}"

    def span_context(self, *, remote: bool = False) -> SpanContext:
        """As the SDK's type."""
        flags = SAMPLED if self.sampled else UNSAMPLED
        return SpanContext(self.trace_id, self.span_id, remote, flags)


def parse_traceparent(text: str) -> TraceContext | None:
    """The context in a ``traceparent`` header, or None where it is not a valid one."""
    around = _PROPAGATOR.extract({"traceparent": text})
    found = trace.get_current_span(around).get_span_context()
    if not found.is_valid:
        return None
    return TraceContext(found.trace_id, found.span_id, found.trace_flags.sampled)


class SpanMaker:
    """Draws identities, decides on sampling, and builds finished spans.

    The sampling decision is made once, at the root (``begin``); every other span follows its
    parent, so that a request is traced whole or not at all.
    """

    def __init__(
        self,
        resource: Resource,
        sampler: Sampler,
        processor: SpanProcessor | None,
        *,
        version: str = "",
    ) -> None:
        """Without ``processor`` nothing is ever sampled."""
        self._resource = resource
        self._sampler = sampler
        self._processor = processor
        self._scope = InstrumentationScope("outrider", version)
        # A generator of its own: seeding Python's shared one for reproducible text must not
        # make two processes draw the same ids.
        self._random = random.Random(os.urandom(32))

    def begin(self, name: str, parent: TraceContext | None) -> TraceContext:
        """The identity of a new request's span, with the sampling decision in it."""
        trace_id = parent.trace_id if parent else self._random.getrandbits(128) or 1
        sampled = False
        if self._processor is not None:
            around: Context | None = None
            if parent is not None:
                remote = trace.NonRecordingSpan(parent.span_context(remote=True))
                around = trace.set_span_in_context(remote, Context())
            result = self._sampler.should_sample(around or Context(), trace_id, name)
            sampled = result.decision is Decision.RECORD_AND_SAMPLE
        return TraceContext(trace_id, self._span_id(), sampled)

    def child(self, parent: TraceContext) -> TraceContext:
        """The identity of a new span in the same trace."""
        return TraceContext(parent.trace_id, self._span_id(), parent.sampled)

    def finish(
        self,
        name: str,
        context: TraceContext,
        parent: TraceContext | None,
        start_ns: int,
        end_ns: int,
        attributes: Mapping[str, AttributeValue],
        *,
        remote_parent: bool = False,
        links: Sequence[TraceContext] = (),
        events: Sequence[Event] = (),
        kind: SpanKind = SpanKind.INTERNAL,
        error: str | None = None,
    ) -> None:
        """Hands over one finished span; nothing happens where the trace is not sampled.

        Times are nanoseconds since the epoch. ``error`` sets the status to ERROR.
        """
        if self._processor is None or not context.sampled:
            return
        span = ReadableSpan(
            name=name,
            context=context.span_context(),
            parent=parent.span_context(remote=remote_parent) if parent else None,
            resource=self._resource,
            attributes=attributes,
            events=events,
            links=tuple(Link(one.span_context()) for one in links),
            kind=kind,
            status=_UNSET if error is None else Status(StatusCode.ERROR, error),
            start_time=start_ns,
            end_time=end_ns,
            instrumentation_scope=self._scope,
        )
        self._processor.on_end(span)

    def _span_id(self) -> int:
        return self._random.getrandbits(64) or 1
