"""The counting processor: nothing is lost in silence."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import SpanContext, TraceFlags

from outrider.shared.telemetry import counting_processor
from outrider.shared.telemetry.counting_processor import CountingProcessor, SpanCounts


class Gathering(SpanExporter):
    """Keeps what it gets; waits for ``gate`` and answers ``result``."""

    def __init__(self, result: SpanExportResult = SpanExportResult.SUCCESS) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.result = result
        self.batches: list[list[ReadableSpan]] = []
        self.closed = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.gate.wait(10)
        self.batches.append(list(spans))
        return self.result

    def shutdown(self) -> None:
        self.closed = True


def span(number: int, sampled: bool = True) -> ReadableSpan:
    return ReadableSpan(str(number), SpanContext(1, number + 1, False, TraceFlags(sampled)))


def names(exporter: Gathering) -> list[str]:
    return [one.name for batch in exporter.batches for one in batch]


def test_batches_keep_order_and_size() -> None:
    exporter = Gathering()
    processor = CountingProcessor([exporter], batch_size=7, delay_seconds=60)
    for number in range(20):
        processor.on_end(span(number))
    processor.shutdown()
    assert names(exporter) == [str(number) for number in range(20)]
    assert max(len(batch) for batch in exporter.batches) <= 7
    assert exporter.closed
    assert processor.counts == SpanCounts(20, 0, 0, 0, queued=0)


def test_every_exporter_gets_every_span() -> None:
    first, second = Gathering(), Gathering()
    processor = CountingProcessor([first, second])
    processor.on_end(span(0))
    processor.force_flush()
    assert names(first) == names(second) == ["0"]
    processor.shutdown()


def test_unsampled_spans_are_left_out() -> None:
    exporter = Gathering()
    processor = CountingProcessor([exporter])
    processor.on_end(span(0, sampled=False))
    processor.shutdown()
    assert exporter.batches == []
    assert processor.counts.dropped == 0


def test_spans_over_the_queue_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    exporter = Gathering()
    exporter.gate.clear()
    processor = CountingProcessor([exporter], queue_size=10, batch_size=2, delay_seconds=60)
    with caplog.at_level(logging.WARNING):
        for number in range(100):
            processor.on_end(span(number))
    counts = processor.counts
    assert counts.queue_full == 90
    exporter.gate.set()
    processor.shutdown()
    counts = processor.counts
    assert counts.exported + counts.dropped == 100
    assert len(names(exporter)) == counts.exported
    assert sum("queue is full" in line for line in caplog.messages) == 1


def test_failed_exports_are_counted() -> None:
    processor = CountingProcessor([Gathering(SpanExportResult.FAILURE)])
    processor.on_end(span(0))
    processor.force_flush()
    assert processor.counts == SpanCounts(0, 0, 1, 0, queued=0)
    processor.shutdown()


def test_span_that_one_of_two_exporters_refused_is_counted() -> None:
    good, bad = Gathering(), Gathering(SpanExportResult.FAILURE)
    processor = CountingProcessor([bad, good])
    processor.on_end(span(0))
    processor.shutdown()
    assert names(good) == ["0"]
    assert processor.counts == SpanCounts(0, 0, 1, 0, queued=0)


def test_export_that_raises_is_counted_and_others_follow() -> None:
    class Raising(Gathering):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            if spans[0].name == "0":
                raise OSError("disk full")
            return super().export(spans)

    exporter = Raising()
    processor = CountingProcessor([exporter])
    processor.on_end(span(0))
    processor.force_flush()
    processor.on_end(span(1))
    processor.shutdown()
    assert names(exporter) == ["1"]
    assert processor.counts == SpanCounts(1, 0, 1, 0, queued=0)


def test_shutdown_cuts_exports_that_hang(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As OTLP's exporters do with a collector that is gone: they try until they are closed."""

    class Trying(Gathering):
        def shutdown(self) -> None:
            super().shutdown()
            self.gate.set()

    monkeypatch.setattr(counting_processor, "_SHUTDOWN_SECONDS", 0.05)
    exporter = Trying(SpanExportResult.FAILURE)
    exporter.gate.clear()
    processor = CountingProcessor([exporter], batch_size=2, delay_seconds=60)
    for number in range(5):
        processor.on_end(span(number))
    processor.shutdown()
    assert exporter.closed
    assert processor.counts.exported == 0
    assert any("5 spans were not delivered" in line for line in caplog.messages)


def test_spans_after_the_end_are_counted() -> None:
    processor = CountingProcessor([Gathering()])
    processor.shutdown()
    processor.on_end(span(0))
    assert processor.counts.shut_down == 1


def test_two_thousand_rounds_a_second_lose_no_span() -> None:
    """Two spans a round, as the coordinator makes them, for a second's worth of rounds."""
    exporter = Gathering()
    processor = CountingProcessor([exporter])
    for number in range(4000):
        processor.on_end(span(number))
    processor.shutdown()
    assert processor.counts == SpanCounts(4000, 0, 0, 0, queued=0)
