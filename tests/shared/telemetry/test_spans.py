"""Identities of spans, the traceparent header, and the decision to sample."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from outrider.shared.telemetry.spans import SpanMaker, TraceContext, parse_traceparent

GOOD = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize(
    ("text", "sampled"),
    [
        (GOOD, True),
        (GOOD[:-2] + "00", False),
        (GOOD[:-2] + "03", True),
        # Later versions are read as far as version 00 goes.
        ("cc" + GOOD[2:] + "-what-comes-later", True),
    ],
)
def test_traceparent_is_read(text: str, sampled: bool) -> None:
    expected = TraceContext(0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331, sampled)
    assert parse_traceparent(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "ff" + GOOD[2:],
        GOOD + "-more",
        GOOD.replace("0af7651916cd43dd8448eb211c80319c", "0" * 32),
        GOOD.replace("b7ad6b7169203331", "0" * 16),
        GOOD[:-1],
        GOOD.replace("0af7", "0AF7"),
        GOOD.replace("0af7", "0gf7"),
        "",
        "-".join(["00"] * 4),
        "x" * 100_000,
    ],
)
def test_traceparent_that_is_not_valid_is_none(text: str) -> None:
    assert parse_traceparent(text) is None


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.booleans())
def test_traceparent_round_trips(trace_id: int, span_id: int, sampled: bool) -> None:
    context = TraceContext(trace_id, span_id, sampled)
    assert parse_traceparent(context.traceparent) == context


def maker(ratio: float) -> tuple[SpanMaker, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    sampler = ParentBased(TraceIdRatioBased(ratio))
    return SpanMaker(Resource({}), sampler, SimpleSpanProcessor(exporter)), exporter


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_sampling_follows_the_client(sampled: bool, ratio: float) -> None:
    spans, _ = maker(ratio)
    parent = TraceContext(5, 7, sampled)
    context = spans.begin("request", parent)
    assert context.trace_id == 5
    assert context.sampled is sampled


def test_sampling_ratio_is_the_sdks_own_decision() -> None:
    spans, _ = maker(0.25)
    kept = [spans.begin("request", None) for _ in range(4000)]
    reference = TraceIdRatioBased(0.25)
    for context in kept:
        decision = reference.should_sample(None, context.trace_id, "request").decision
        assert context.sampled == decision.is_sampled()
    assert 0.2 < sum(one.sampled for one in kept) / len(kept) < 0.3


def test_sampling_without_a_processor_is_never() -> None:
    spans = SpanMaker(Resource({}), ParentBased(TraceIdRatioBased(1.0)), None)
    assert not spans.begin("request", TraceContext(5, 7, True)).sampled


def test_unsampled_spans_do_not_come_out() -> None:
    spans, exporter = maker(0.0)
    context = spans.begin("request", None)
    spans.finish("request", context, None, 1, 2, {})
    assert exporter.get_finished_spans() == ()


def test_finished_span_carries_what_it_was_given() -> None:
    spans, exporter = maker(1.0)
    parent = spans.begin("request", None)
    child = spans.child(parent)
    spans.finish("round", child, parent, 10, 30, {"a": 1}, links=(parent,), error="broken")
    (span,) = exporter.get_finished_spans()
    assert (span.name, span.start_time, span.end_time) == ("round", 10, 30)
    assert span.context.span_id == child.span_id and span.parent.span_id == parent.span_id
    assert span.context.trace_id == parent.trace_id
    assert dict(span.attributes) == {"a": 1}
    assert [link.context.span_id for link in span.links] == [parent.span_id]
    assert not span.status.is_ok and span.status.description == "broken"


def test_identities_ignore_the_shared_seed() -> None:
    spans, _ = maker(1.0)
    random.seed(0)
    first = spans.begin("request", None)
    random.seed(0)
    assert spans.begin("request", None).trace_id != first.trace_id


def test_finished_span_is_what_the_sdk_would_export() -> None:
    """Processors of an ordinary provider take our spans like its own."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    provider.get_tracer("t").start_span("theirs", start_time=1).end(2)
    ours = SpanMaker(provider.resource, provider.sampler, SimpleSpanProcessor(exporter))
    ours.finish("ours", ours.begin("ours", None), None, 1, 2, {})
    theirs, own = exporter.get_finished_spans()
    assert json.loads(theirs.to_json()).keys() == json.loads(own.to_json()).keys()
