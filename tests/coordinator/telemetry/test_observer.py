"""The coordinator's observer, fed with records made by hand."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased

from outrider.coordinator.bench.studies import telemetry_cost
from outrider.coordinator.telemetry.observer import TelemetryObserver
from outrider.coordinator.telemetry.recent_rounds import MOST_REQUESTS, RoundsKept
from outrider.coordinator.telemetry.records import (
    ConnectionRecord,
    RequestRecord,
    RoundRecord,
    SequenceRound,
)
from outrider.coordinator.telemetry.span_attributes import mode_of
from outrider.shared.config.schema import TelemetryConfig
from outrider.shared.core.types import Decoding
from outrider.shared.telemetry.setup import Telemetry
from outrider.shared.telemetry.spans import SpanMaker


def sequence(request_id: str = "r", **changes: Any) -> SequenceRound:
    made = SequenceRound(request_id, 0, 1, 10, 4, 4, 3, 4, 5, 1, 1, 1)
    return replace(made, **changes)


def ended(request_id: str = "r", **changes: Any) -> RequestRecord:
    made = RequestRecord(
        request_id=request_id, sample_index=0, sequence_id=1, traceparent="", arrived_ns=10**9,
        admitted_ns=2 * 10**9, first_token_ns=3 * 10**9, finished_ns=4 * 10**9, prompt_tokens=5,
        cached_prompt_tokens=3, completion_tokens=8, reason="MAX_TOKENS", error="", k=4,
        rule="GREEDY", temperature=0.0, rounds=2, proposed_by_position=(2, 2),
        accepted_by_position=(2, 1), decoding=Decoding(seed=2**64 - 1),
        max_new_tokens=8, num_samples=1,
    )  # fmt: skip
    return replace(made, **changes)


@pytest.fixture
def observer(monkeypatch: pytest.MonkeyPatch) -> tuple[TelemetryObserver, InMemorySpanExporter]:
    """An observer that traces everything into memory."""
    exporter = InMemorySpanExporter()
    telemetry = Telemetry(TelemetryConfig(), "coordinator")
    spans = SpanMaker(Resource({}), ParentBased(ALWAYS_ON), SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "spans", spans)
    monkeypatch.setattr(Telemetry, "tracing", property(lambda self: True))
    return TelemetryObserver(telemetry, profile=True), exporter


def run(seen: TelemetryObserver, number: int, *sequences: SequenceRound) -> str:
    """One round over ``sequences``; its traceparent."""
    context = seen.traceparent(number, list(dict.fromkeys(one.request_id for one in sequences)))
    seen.round(replace(telemetry_cost._round(number, context), sequences=tuple(sequences)))
    return context


def test_observer_that_nobody_reads_builds_no_rounds_but_logs_requests(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen = TelemetryObserver(Telemetry(TelemetryConfig(), "coordinator"))
    assert not seen.enabled and seen.follows
    seen.request_started("r", "")
    assert seen.traceparent(1, ["r"]) == ""
    with caplog.at_level(logging.INFO, "outrider.request"):
        seen.request(ended())
    (line,) = caplog.records
    assert line.message == "request max_tokens"
    assert line.outrider_fields["completion_tokens"] == 8  # type: ignore[attr-defined]
    assert len(line.outrider_fields["trace_id"]) == 32  # type: ignore[attr-defined]


def test_failed_request_is_an_error_in_trace_and_log(
    observer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    seen, exporter = observer
    seen.request_started("r", "")
    with caplog.at_level(logging.WARNING, "outrider.request"):
        seen.request(ended(reason="UNAVAILABLE", error="the base is away", first_token_ns=0))
    root = exporter.get_finished_spans()[-1]
    assert not root.status.is_ok and root.status.description == "the base is away"
    assert root.attributes["error.type"] == "UNAVAILABLE"
    assert caplog.records[0].levelname == "WARNING"


def test_seed_of_64_bits_fits_an_attribute(observer: Any) -> None:
    seen, exporter = observer
    seen.request_started("r", "")
    seen.request(ended())
    root = exporter.get_finished_spans()[-1]
    assert root.attributes["gen_ai.request.seed"] == -1


def test_samples_of_one_request_stand_in_one_trace(observer: Any) -> None:
    seen, exporter = observer
    seen.request_started("r", "")
    run(seen, 1, sequence(sample_index=0), sequence(sample_index=1))
    for index in range(2):
        seen.request(ended(sample_index=index, num_samples=2))
    spans = exporter.get_finished_spans()
    roots = [one for one in spans if one.name.startswith("text_completion")]
    assert [one.attributes["outrider.sample.index"] for one in roots] == [0, 1]
    assert len({one.context.trace_id for one in spans}) == 1
    assert len({one.context.span_id for one in spans}) == len(spans)
    (one,) = [one for one in spans if one.name == "round"]
    assert one.attributes["outrider.proposed"] == 8


def test_finished_requests_leave_nothing_behind(observer: Any) -> None:
    seen, _ = observer
    for number in range(300):
        name = f"r{number}"
        seen.request_started(name, "")
        run(seen, number, sequence(name))
        seen.request(ended(name))
    assert len(seen._tracing._requests) == len(seen._tracing._rounds) == 0
    assert len(seen.kept._kept) == MOST_REQUESTS


def test_rounds_without_a_record_are_forgotten(observer: Any) -> None:
    seen, _ = observer
    seen.request_started("r", "")
    for number in range(1000):
        seen.traceparent(number, ["r"])
    assert len(seen._tracing._rounds) <= 64


def test_failures_of_telemetry_stay_inside(observer: Any, caplog: pytest.LogCaptureFixture) -> None:
    seen, _ = observer
    seen.request_started("r", "")
    context = seen.traceparent(1, ["r"])
    broken = replace(telemetry_cost._round(1, context), sequences=None)  # type: ignore[arg-type]
    seen.round(broken)
    assert "telemetry failed" in caplog.text


def test_failover_is_told_once_and_only_to_requests_that_run(observer: Any) -> None:
    seen, exporter = observer
    seen.request_started("before", "")
    run(seen, 1, sequence("before"))
    seen.request(ended("before"))
    seen.request_started("r", "")
    run(seen, 2, sequence("r"))
    for at, up in [(10, False), (11, False), (12, True), (13, True)]:
        seen.connection(ConnectionRecord("draft", up, at, "gone" if not up else "", 3))
    seen.request(ended("r"))
    spans = exporter.get_finished_spans()
    (failover,) = [one for one in spans if one.name == "failover"]
    assert (failover.start_time, failover.end_time) == (10, 12)
    assert failover.attributes["outrider.reason"] == "gone"
    root = spans[-1]
    names = [event.name for event in root.events if event.name.endswith(("failover", "recovered"))]
    assert names == ["outrider.failover", "outrider.failover", "outrider.recovered"]


@pytest.mark.parametrize(
    ("sequences", "mode"),
    [
        ([sequence()], "speculative"),
        ([sequence(), sequence(proposed=0, accepted=0, rows=1, emitted=1)], "speculative"),
        ([sequence(proposed=0, accepted=0, rows=1, emitted=1)], "plain"),
        ([sequence(proposed=0, accepted=0, rows=8, emitted=0)], "prefill"),
        ([sequence(proposed=0, accepted=0, rows=8, emitted=1)], "prefill"),
        ([sequence(), sequence(proposed=0, accepted=0, rows=8, emitted=0)], "mixed"),
    ],
)
def test_mode_of_a_round(sequences: list[SequenceRound], mode: str) -> None:
    record: RoundRecord = replace(telemetry_cost._round(1, ""), sequences=tuple(sequences))
    assert mode_of(record) == mode


def test_kept_rounds_are_bounded() -> None:
    kept = RoundsKept()
    for number in range(3 * MOST_REQUESTS):
        kept.begin(f"r{number}", "")
        kept.round(replace(telemetry_cost._round(1, ""), sequences=(sequence(f"r{number}"),)))
    assert kept.get("r0") is None
    assert kept.get(f"r{3 * MOST_REQUESTS - 1}") is not None
    assert kept._rounds == MOST_REQUESTS


def test_two_thousand_rounds_a_second_reach_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry_cost, "RATE_SECONDS", 1.0)
    with telemetry_cost.collector() as (endpoint, counts):
        figures = telemetry_cost.at_rate(endpoint, counts)
    assert figures["dropped"] == 0
    assert figures["received"] == 2 * 2000 + 3
