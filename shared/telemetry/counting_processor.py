"""The SDK's batch processor, with a count of every span that it could not deliver.

A trace with holes that nobody knows of misleads. The SDK's own metrics are off unless an
environment variable says otherwise, and they count a span as processed when it is handed to
the exporter, whatever that makes of it. Here each span that is not delivered is counted with
its reason, and the counts are metrics.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

log = logging.getLogger(__name__)

_SHUTDOWN_SECONDS = 15
"""How long an unreachable collector may delay the end of a process, before exports are cut."""


@dataclass(frozen=True, slots=True)
class SpanCounts:
    """What became of the spans so far."""

    exported: int
    queue_full: int
    """Dropped because the exporter was slower than the rounds."""
    export_failed: int
    """Handed to an exporter that gave up on them."""
    shut_down: int
    """Came after the end."""
    queued: int
    """Waiting for export, or in it."""

    @property
    def dropped(self) -> int:
        """All that were not delivered."""
        return self.queue_full + self.export_failed + self.shut_down


class CountingProcessor(SpanProcessor):
    """Hands finished spans to a ``BatchSpanProcessor`` while there is room; never blocks."""

    def __init__(
        self,
        exporters: Sequence[SpanExporter],
        *,
        queue_size: int = 32768,
        batch_size: int = 256,
        delay_seconds: float = 0.5,
    ) -> None:
        """Every batch goes to every exporter; a span waits ``delay_seconds`` at most."""
        self._capacity = queue_size
        self._exporter = _CountingExporter(exporters)
        self._batches = BatchSpanProcessor(
            self._exporter,
            max_queue_size=queue_size,
            max_export_batch_size=min(batch_size, queue_size),
            schedule_delay_millis=delay_seconds * 1e3,
        )
        # Spans end on several threads, and none may slip in behind the end.
        self._lock = threading.Lock()
        self._taken = self._full = self._late = 0
        self._stopped = False

    def on_end(self, span: ReadableSpan) -> None:
        """Takes one finished span; the oldest ones stay where the queue is full."""
        if not (span.context and span.context.trace_flags.sampled):
            return
        with self._lock:
            if self._stopped:
                self._late += 1
                return
            if self._taken - self._exporter.exported - self._exporter.failed >= self._capacity:
                if self._full == 0:
                    log.warning("span queue is full (%d); spans are dropped", self._capacity)
                self._full += 1
                return
            self._taken += 1
            self._batches.on_end(span)

    @property
    def counts(self) -> SpanCounts:
        """A snapshot."""
        exported, failed = self._exporter.exported, self._exporter.failed
        return SpanCounts(
            exported, self._full, failed, self._late, queued=self._taken - exported - failed
        )

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Exports what is queued, in the caller's thread."""
        return self._batches.force_flush(timeout_millis)

    def shutdown(self) -> None:
        """Exports what is queued and closes the exporters; later spans are counted as late."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
        # The SDK's would wait twice as long.
        stopping = threading.Thread(target=self._batches.shutdown, name="span-end", daemon=True)
        stopping.start()
        stopping.join(_SHUTDOWN_SECONDS)
        self._exporter.shutdown()
        counts = self.counts
        if lost := counts.dropped + counts.queued:
            log.warning("%d spans were not delivered: %s", lost, counts)


class _CountingExporter(SpanExporter):
    """Exports to all of ``exporters``; counts the spans that each of them took, and the others.

    The batch processor exports one batch at a time.
    """

    def __init__(self, exporters: Sequence[SpanExporter]) -> None:
        self._exporters = exporters
        self._closing = threading.Lock()
        self._closed = False
        self.exported = self.failed = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        good = True
        for exporter in self._exporters:
            try:
                good &= exporter.export(spans) is SpanExportResult.SUCCESS
            except Exception:
                good = False
                log.exception("span export failed")
        if good:
            self.exported += len(spans)
            return SpanExportResult.SUCCESS
        self.failed += len(spans)
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
        for exporter in self._exporters:
            exporter.shutdown()
