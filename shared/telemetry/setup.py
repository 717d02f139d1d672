"""Telemetry of one process: OpenTelemetry set up from the configuration, or off.

Off is the default and costs nothing: no exporter is imported, no thread is started. Traces,
metrics and the Prometheus endpoint are switched on one by one, by ``[telemetry]`` settings
or by the standard ``OTEL_*`` variables, which ``shared/config`` maps to the same settings.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from importlib import metadata

from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, Sampler, TraceIdRatioBased

from outrider.shared.config.telemetry import TelemetryConfig
from outrider.shared.telemetry import exporters
from outrider.shared.telemetry.counting_processor import CountingProcessor
from outrider.shared.telemetry.metrics import Instruments
from outrider.shared.telemetry.prometheus import PrometheusEndpoint
from outrider.shared.telemetry.spans import SpanMaker

_NAMES = {"coordinator": "coordinator", "base": "verify", "draft": "draft"}
"""Services by section of the configuration."""
_COMPONENT = {
    "otel.component.type": "batching_span_processor",
    "otel.component.name": "batching_span_processor/0",
}


class Telemetry:
    """What a process needs to be seen: spans and instruments.

    ``spans`` and ``instruments`` are always there; where they are off they do nothing.
    """

    def __init__(self, config: TelemetryConfig, role: str) -> None:
        """``role`` is "coordinator", "base" or "draft".

        Raises ``ConfigError`` where a port, a path or a package is not to be had.
        """
        version = metadata.version("outrider")
        self.role = role
        self.resource = Resource.create(
            {
                "service.name": f"{config.service_name}-{_NAMES[role]}",
                "service.namespace": config.service_name,
                "service.version": version,
                "service.instance.id": f"{role}-{os.getpid()}",
                "process.pid": os.getpid(),
            }
        )
        self._processor = self._traces(config)
        self._tracers: TracerProvider | None = None
        sampler: Sampler = ALWAYS_OFF
        if self._processor is not None:
            # Without a ratio of ours the SDK takes OTEL_TRACES_SAMPLER, by default every trace
            # whose parent is kept or that has none.
            ratio = config.sample_ratio
            self._tracers = TracerProvider(
                sampler=None if ratio is None else ParentBased(TraceIdRatioBased(ratio)),
                resource=self.resource,
                shutdown_on_exit=False,
            )
            self._tracers.add_span_processor(self._processor)
            sampler = self._tracers.sampler
        self.spans = SpanMaker(self.resource, sampler, self._processor, version=version)
        self.prometheus: PrometheusEndpoint | None = None
        self._meters = self._metrics(config)
        provider = self._meters or NoOpMeterProvider()
        self.instruments = Instruments(provider.get_meter("outrider", version))
        if self._meters is not None:
            self._observe_process()

    @property
    def tracing(self) -> bool:
        """Whether spans may come out."""
        return self._processor is not None

    @property
    def metering(self) -> bool:
        """Whether metrics are read by anyone."""
        return self._meters is not None

    def shutdown(self) -> None:
        """Exports what is left and ends the threads; may take the exporters' timeout."""
        if self._tracers is not None:
            self._tracers.shutdown()
        if self._meters is not None:
            self._meters.shutdown()
        if self.prometheus is not None:
            self.prometheus.close()

    def _traces(self, config: TelemetryConfig) -> CountingProcessor | None:
        kinds = _kinds(config.traces)
        if not kinds:
            return None
        made = [
            exporters.span_exporter(kind, endpoint=config.endpoint, file=config.file)
            for kind in kinds
        ]
        return CountingProcessor(made, queue_size=config.span_queue)

    def _metrics(self, config: TelemetryConfig) -> MeterProvider | None:
        readers: list[MetricReader] = []
        port = getattr(config, f"prometheus_{self.role}")
        if port is not None:
            self.prometheus = PrometheusEndpoint(config.prometheus_host, port)
            readers.append(self.prometheus.reader)
        for kind in _kinds(config.metrics):
            readers.append(
                PeriodicExportingMetricReader(
                    exporters.metric_exporter(kind, endpoint=config.endpoint, file=config.file),
                    export_interval_millis=config.metrics_seconds * 1e3,
                )
            )
        if not readers:
            return None
        # Exemplars would cost at every record; the traces have the single cases.
        return MeterProvider(
            readers,
            resource=self.resource,
            exemplar_filter=AlwaysOffExemplarFilter(),
            shutdown_on_exit=False,
        )

    def _observe_process(self) -> None:
        from outrider.shared.core.resident_memory import resident_bytes

        observe = self.instruments.observe
        observe("process.memory.usage", lambda: [(resident_bytes(), {})])
        observe("process.cpu.time", _cpu_seconds)
        processor = self._processor
        if processor is not None:
            observe("otel.sdk.processor.span.processed", lambda: _processed(processor))
            observe(
                "otel.sdk.processor.span.queue.size",
                lambda: [(processor.counts.queued, _COMPONENT)],
            )


def _processed(processor: CountingProcessor) -> Iterable[tuple[float, Mapping[str, str]]]:
    counts = processor.counts
    yield counts.exported, _COMPONENT
    for reason in ("queue_full", "export_failed", "shut_down"):
        yield getattr(counts, reason), {**_COMPONENT, "error.type": reason}


def _cpu_seconds() -> Iterable[tuple[float, Mapping[str, str]]]:
    times = os.times()
    yield times.user, {"cpu.mode": "user"}
    yield times.system, {"cpu.mode": "system"}


def _kinds(text: str) -> list[str]:
    return [] if text == "none" else text.split(",")
