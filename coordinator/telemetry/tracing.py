"""Spans of requests and rounds, made from records while the next verdict is being computed.

::

    text_completion <model>          one per sample, in the client's trace
    ├── queue                        arrival to admission
    ├── prefill                      admission to the first token
    │   └── round …
    ├── round                        one per round; linked to every request in it
    │   ├── draft                    made by the draft service
    │   ├── verify                   made by the verify service
    │   └── accept                   verdicts' arrival to the logs
    └── (events)                     admitted, first token, failover, recovered

A round of several requests is one span. It stands in the trace of one of them, the *lead*, and
the services' spans with it; each of the others gets a ``round`` span of its own part, linked to
the lead's. The identity of a round's span is drawn before its messages are sent, since they
carry it; everything else happens afterwards.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from opentelemetry.sdk.trace import Event
from opentelemetry.trace import SpanKind

from outrider.coordinator.telemetry import phases, span_attributes
from outrider.coordinator.telemetry.attributes import OPERATION
from outrider.coordinator.telemetry.records import (
    ConnectionRecord,
    RequestRecord,
    RoundRecord,
    SequenceRound,
)
from outrider.shared.telemetry.spans import SpanMaker, TraceContext, parse_traceparent

MOST_EVENTS = 128
MOST_OPEN_ROUNDS = 64
MOST_REQUESTS = 8192


@dataclass(slots=True)
class _Request:
    """What is known of a request between its start and the end of its last sample."""

    root: TraceContext
    parent: TraceContext | None
    samples: dict[int, _Sample] = field(default_factory=dict)
    ended: int = 0


@dataclass(slots=True)
class _Sample:
    span: TraceContext
    prefill: TraceContext
    started: bool = False
    """A token was emitted."""
    events: list[Event] = field(default_factory=list)


class Tracing:
    """Turns records into spans."""

    def __init__(self, spans: SpanMaker, model: Callable[[], str]) -> None:
        """``model`` names the base; asked when a span is made."""
        self._spans = spans
        self._model = model
        self._requests: OrderedDict[str, _Request] = OrderedDict()
        self._rounds: OrderedDict[int, tuple[str, TraceContext]] = OrderedDict()
        self._down: dict[str, ConnectionRecord] = {}

    def begin(self, request_id: str, traceparent: str) -> TraceContext:
        """A request starts; ``traceparent`` is the client's. Decides whether it is traced."""
        parent = parse_traceparent(traceparent) if traceparent else None
        root = self._spans.begin(OPERATION, parent)
        self._requests[request_id] = _Request(root, parent)
        if len(self._requests) > MOST_REQUESTS:
            # Of one that was refused before it ran, nothing more is heard.
            self._requests.popitem(last=False)
        return root

    def context(self, request_id: str) -> TraceContext | None:
        """The identity of a request's span, for its log line."""
        found = self._requests.get(request_id)
        return found.root if found is not None else None

    def traceparent(self, round_number: int, request_ids: Sequence[str]) -> str:
        """What the messages of a round carry; empty where none of its requests is traced."""
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None and request.root.sampled:
                context = self._spans.child(request.root)
                self._keep(round_number, request_id, context)
                return context.traceparent
        return ""

    def follow(self, round_number: int, request_ids: Sequence[str], traceparent: str) -> None:
        """A round without messages is this span."""
        context = parse_traceparent(traceparent)
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if context is not None and request is not None and request.root.sampled:
                self._keep(round_number, request_id, context)
                return

    def _keep(self, round_number: int, request_id: str, context: TraceContext) -> None:
        self._rounds[round_number] = (request_id, context)
        if len(self._rounds) > MOST_OPEN_ROUNDS:
            self._rounds.popitem(last=False)

    def round(self, record: RoundRecord, parts: phases.Phases, mode: str) -> None:
        """The spans of one round, for every traced request in it."""
        lead_id, lead = self._rounds.pop(record.round, ("", None))
        if lead is None:
            return
        by_request: dict[str, list[SequenceRound]] = {}
        for one in record.sequences:
            by_request.setdefault(one.request_id, []).append(one)
        shared = span_attributes.of_round(record, parts, mode)
        links = []
        parent: TraceContext | None = None
        for request_id, of in by_request.items():
            request = self._requests.get(request_id)
            if request is None or not request.root.sampled:
                continue
            sample = self._sample(request, of[0].sample_index)
            links.append(sample.span)
            if request_id == lead_id:
                parent = sample.span if sample.started else sample.prefill
            else:
                self._spans.finish(
                    "round",
                    self._spans.child(sample.span),
                    sample.span if sample.started else sample.prefill,
                    record.started_ns,
                    record.finished_ns,
                    {
                        **shared,
                        **span_attributes.of_sequences(of),
                        "outrider.request.id": request_id,
                    },
                    links=(lead,),
                )
            for each in of:
                if each.emitted:
                    self._sample(request, each.sample_index).started = True
        if parent is None:
            return
        self._spans.finish(
            "round",
            lead,
            parent,
            record.started_ns,
            record.finished_ns,
            {
                **shared,
                **span_attributes.of_sequences(record.sequences),
                "outrider.request.id": lead_id,
            },
            links=links,
        )
        answered = max(record.draft.answered_ns, record.verify.answered_ns)
        if answered and record.finished_ns > answered:
            self._spans.finish(
                "accept", self._spans.child(lead), lead, answered, record.finished_ns, {}
            )

    def request(self, record: RequestRecord) -> None:
        """The spans of one sample that is over."""
        request = self._requests.get(record.request_id)
        if request is None:
            return
        request.ended += 1
        if request.ended >= record.num_samples:
            del self._requests[record.request_id]
        if not request.root.sampled:
            return
        sample = self._sample(request, record.sample_index)
        request.samples.pop(record.sample_index)
        span = sample.span
        admitted = record.admitted_ns or record.finished_ns
        self._spans.finish("queue", self._spans.child(span), span, record.arrived_ns, admitted, {})
        events = sample.events
        if record.admitted_ns:
            first = record.first_token_ns or record.finished_ns
            self._spans.finish("prefill", sample.prefill, span, admitted, first, {})
            events.append(Event("outrider.admitted", {}, record.admitted_ns))
        if record.first_token_ns:
            events.append(Event("outrider.first_token", {}, record.first_token_ns))
        self._spans.finish(
            f"{OPERATION} {self._model()}",
            span,
            request.parent,
            record.arrived_ns,
            record.finished_ns,
            span_attributes.of_request(record, self._model()),
            remote_parent=True,
            events=sorted(events, key=lambda event: event.timestamp),
            kind=SpanKind.SERVER,
            error=record.error or None,
        )

    def connection(self, record: ConnectionRecord) -> None:
        """A service was lost or came back: an event on every traced request, then a span each."""
        lost = self._down.pop(record.service, None)
        if not record.up:
            # The first loss counts: the connection may report more while it is down.
            self._down[record.service] = lost or record
            name, attributes = "outrider.failover", span_attributes.of_failover(record)
        elif lost is not None:
            name, attributes = "outrider.recovered", {"outrider.service": record.service}
        else:
            return
        for request in self._requests.values():
            if not request.root.sampled:
                continue
            if not request.samples and not request.ended:
                self._sample(request, 0)  # lost before its first round was over
            for sample in request.samples.values():
                if len(sample.events) < MOST_EVENTS:
                    sample.events.append(Event(name, attributes, record.at_ns))
                if lost is not None and record.up:
                    self._spans.finish(
                        "failover",
                        self._spans.child(sample.span),
                        sample.span,
                        lost.at_ns,
                        record.at_ns,
                        span_attributes.of_failover(lost),
                    )

    # --- parts -----------------------------------------------------------------------------------

    def _sample(self, request: _Request, index: int) -> _Sample:
        sample = request.samples.get(index)
        if sample is None:
            # The first sample is the request's span; more of them stand beside it.
            span = request.root if index == 0 else self._spans.child(request.root)
            sample = request.samples[index] = _Sample(span, self._spans.child(span))
        return sample
