"""A span processor that batches, never blocks, and counts what it could not keep.

The SDK's own reports drops only as log lines unless an internal switch is set. A trace
with holes that nobody knows of misleads, so here every span that is not delivered is
counted with its reason, and the counts are metrics.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass

from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY, Context, attach, detach, set_value
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

log = logging.getLogger(__name__)


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

    @property
    def dropped(self) -> int:
        """All that were not delivered."""
        return self.queue_full + self.export_failed + self.shut_down


class BatchingProcessor(SpanProcessor):
    """Queues finished spans and exports them in batches from one daemon thread."""

    def __init__(
        self,
        exporters: list[SpanExporter],
        *,
        queue_size: int = 32768,
        batch_size: int = 256,
        delay_seconds: float = 0.5,
    ) -> None:
        """Every batch goes to every exporter; a span waits ``delay_seconds`` at most."""
        self._exporters = exporters
        self._queue: deque[ReadableSpan] = deque()
        self.capacity = queue_size
        self._batch_size = batch_size
        self._delay = delay_seconds
        self._exported = self._full = self._failed = self._late = 0
        self._wake = threading.Event()
        self._exporting = threading.Lock()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="span-export", daemon=True)
        self._thread.start()

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Nothing to do before a span is finished."""

    def on_end(self, span: ReadableSpan) -> None:
        """Takes one finished span; the oldest ones stay where the queue is full."""
        if not (span.context and span.context.trace_flags.sampled):
            return
        if self._stopped:
            self._late += 1
        elif len(self._queue) >= self.capacity:
            if self._full == 0:
                log.warning("span queue is full (%d); spans are dropped", self.capacity)
            self._full += 1
        else:
            self._queue.append(span)
            if len(self._queue) >= self.capacity // 2:
                self._wake.set()

    @property
    def counts(self) -> SpanCounts:
        """A snapshot."""
        return SpanCounts(
            self._exported, self._full, self._failed, self._late, queued=len(self._queue)
        )

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Exports what is queued, in the caller's thread."""
        self._drain()
        return True

    def shutdown(self) -> None:
        """Exports what is queued and closes the exporters; later spans are counted as late."""
        if self._stopped:
            return
        self._stopped = True
        self._wake.set()
        self._thread.join(timeout=15)
        for exporter in self._exporters:
            exporter.shutdown()
        if self.counts.dropped:
            log.warning("%d spans were not delivered: %s", self.counts.dropped, self.counts)

    def _run(self) -> None:
        while not self._stopped:
            self._wake.wait(self._delay)
            self._wake.clear()
            self._drain()
        self._drain()

    def _drain(self) -> None:
        with self._exporting:
            while self._queue:
                count = min(len(self._queue), self._batch_size)
                self._export([self._queue.popleft() for _ in range(count)])

    def _export(self, batch: list[ReadableSpan]) -> None:
        # Instrumented libraries must not trace the export of traces.
        token = attach(set_value(_SUPPRESS_INSTRUMENTATION_KEY, True))
        good = True
        try:
            for exporter in self._exporters:
                try:
                    good &= exporter.export(batch) is SpanExportResult.SUCCESS
                except Exception:
                    good = False
                    log.exception("span export failed")
        finally:
            detach(token)
        if good:
            self._exported += len(batch)
        else:
            self._failed += len(batch)
