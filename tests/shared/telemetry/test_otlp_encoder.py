"""The fast span encoder against the SDK's own."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.span import TraceState

from outrider.shared.telemetry.otlp_encoder import SpanEncoder, varint

RESOURCES = (
    Resource({"service.name": "a", "process.pid": 5}),
    Resource({"service.name": "b"}, schema_url="https://example.org/schema"),
)
SCOPES = (InstrumentationScope("outrider", "1"), InstrumentationScope("other", None, "https://s"))

single = st.one_of(
    st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.text(max_size=9)
)
values = st.one_of(
    single, st.lists(st.integers(-5, 300), max_size=3).map(tuple), st.binary(max_size=4)
)
attributes = st.dictionaries(st.text(min_size=1, max_size=8), values, max_size=5)
contexts = st.builds(
    SpanContext,
    st.integers(1, 2**128 - 1),
    st.integers(1, 2**64 - 1),
    st.booleans(),
    st.just(TraceFlags(1)),
    st.sampled_from([TraceState(), TraceState([("vendor", "x")])]),
)
times = st.integers(0, 2**63)


@st.composite
def spans(draw: Any) -> ReadableSpan:
    return ReadableSpan(
        name=draw(st.text(max_size=12)),
        context=draw(contexts),
        parent=draw(st.none() | contexts),
        resource=draw(st.sampled_from(RESOURCES)),
        attributes=draw(attributes),
        events=draw(st.lists(st.builds(Event, st.text(max_size=5), attributes, times), max_size=2)),
        links=draw(st.lists(st.builds(Link, contexts, attributes), max_size=2)),
        kind=draw(st.sampled_from(list(SpanKind))),
        status=draw(
            st.sampled_from(
                [Status(), Status(StatusCode.OK), Status(StatusCode.ERROR, "no such thing")]
            )
        ),
        start_time=draw(times),
        end_time=draw(times),
        instrumentation_scope=draw(st.sampled_from(SCOPES)),
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(spans(), min_size=1, max_size=4))
def test_encoder_equals_the_sdks(batch: list[ReadableSpan]) -> None:
    made = ExportTraceServiceRequest.FromString(SpanEncoder().request(batch))
    assert made == encode_spans(batch)


def test_encoder_keeps_no_wrong_resource() -> None:
    encoder = SpanEncoder()
    context = SpanContext(1, 2, False, TraceFlags(1))
    for resource in (*RESOURCES, *RESOURCES):
        batch = [ReadableSpan("s", context, resource=resource, start_time=1, end_time=2,
                              instrumentation_scope=SCOPES[0])]  # fmt: skip
        made = ExportTraceServiceRequest.FromString(encoder.request(batch))
        assert made == encode_spans(batch)


def test_varint_of_known_values() -> None:
    assert varint(0) == b"\x00"
    assert varint(127) == b"\x7f"
    assert varint(300) == b"\xac\x02"
    assert varint(-1) == b"\xff" * 9 + b"\x01"
