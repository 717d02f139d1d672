"""Where spans and metrics go: OTLP over gRPC and HTTP, the console, JSON lines in a file.

Endpoints, headers, certificates and timeouts of OTLP come from the standard variables
``OTEL_EXPORTER_OTLP_*``, read by the exporters themselves; an endpoint in the configuration
stands above them.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from opentelemetry.sdk.metrics.export import (
    ConsoleMetricExporter,
    MetricExporter,
    MetricExportResult,
    MetricsData,
)
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SpanExporter, SpanExportResult

from outrider.shared.core.errors import ConfigError

EXTRA = "pip install 'outrider[telemetry]'"


def span_exporter(kind: str, *, endpoint: str | None, file: str | None) -> SpanExporter:
    """The exporter named ``kind``, one that the configuration allows; raises ``ConfigError``."""
    if kind == "console":
        return ConsoleSpanExporter(
            out=sys.stderr, formatter=lambda span: span.to_json(indent=None) + "\n"
        )
    if kind == "file":
        return JsonLinesSpanExporter(_file(file))
    made: SpanExporter = _otlp(kind, "trace", endpoint)
    return made


def metric_exporter(kind: str, *, endpoint: str | None, file: str | None) -> MetricExporter:
    """The metric exporter named ``kind``, likewise."""
    if kind == "console":
        return ConsoleMetricExporter(
            out=sys.stderr, formatter=lambda data: data.to_json(indent=None) + "\n"
        )
    if kind == "file":
        return JsonLinesMetricExporter(_file(file))
    made: MetricExporter = _otlp(kind, "metric", endpoint)
    return made


class _Lines:
    """Appends JSON lines; opened at the first one, so that no empty file is left."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream: IO[str] | None = None
        self._lock = threading.Lock()

    def write(self, line: str) -> None:
        with self._lock:
            if self._stream is None:
                self._stream = self._path.open("a", encoding="utf-8")
            # One write of a whole line: several processes may append to one file.
            self._stream.write(line + "\n")
            self._stream.flush()

    def close(self) -> None:
        with self._lock:
            if self._stream is not None:
                self._stream.close()
                self._stream = None


class JsonLinesSpanExporter(SpanExporter):
    """One line a batch, in the JSON of OTLP's file exporter: ``{"resourceSpans": [...]}``.

    Own code, since a file is promised to need no extra packages: the SDK has no such exporter,
    and the one that OpenTelemetry publishes beside it brings three more.
    """

    def __init__(self, path: Path) -> None:
        """Appends to ``path``."""
        self._lines = _Lines(path)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Writes one line."""
        resources: dict[Any, list[ReadableSpan]] = {}
        for span in spans:
            resources.setdefault(span.resource, []).append(span)
        made = [
            {
                "resource": {"attributes": _attributes(resource.attributes)},
                "scopeSpans": [{"scope": {"name": "outrider"}, "spans": [_span(s) for s in of]}],
            }
            for resource, of in resources.items()
        ]
        self._lines.write(json.dumps({"resourceSpans": made}, separators=(",", ":")))
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Closes the file."""
        self._lines.close()


class JsonLinesMetricExporter(MetricExporter):
    """One line a collection, as the SDK writes metrics to JSON."""

    def __init__(self, path: Path) -> None:
        """Appends to ``path``."""
        super().__init__()
        self._lines = _Lines(path)

    def export(
        self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any
    ) -> MetricExportResult:
        """Writes one line."""
        self._lines.write(metrics_data.to_json(indent=None))
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        """Nothing is held back."""
        return True

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        """Closes the file."""
        self._lines.close()


def _otlp(kind: str, signal: Literal["trace", "metric"], endpoint: str | None) -> Any:
    protocol = kind.removeprefix("otlp-")
    try:
        module = importlib.import_module(
            f"opentelemetry.exporter.otlp.proto.{protocol}.{signal}_exporter"
        )
    except ImportError as error:
        raise ConfigError(
            f"telemetry: the {kind} exporter is not installed ({error}); {EXTRA}"
        ) from None
    make = module.OTLPSpanExporter if signal == "trace" else module.OTLPMetricExporter
    if endpoint is None:
        return make()
    if protocol == "grpc":
        return make(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
    # As with OTEL_EXPORTER_OTLP_ENDPOINT, the configuration names the collector, not the signal.
    return make(endpoint=f"{endpoint.rstrip('/')}/v1/{signal}s")


def _file(path: str | None) -> Path:
    if path is None:
        raise ConfigError("telemetry.file is not set; the file exporter needs a path")
    if not Path(path).parent.is_dir():
        raise ConfigError(f"telemetry.file = {path!r}: its folder does not exist")
    return Path(path)


def _span(span: ReadableSpan) -> dict[str, Any]:
    context = span.context
    made: dict[str, Any] = {
        "traceId": f"{context.trace_id:032x}",
        "spanId": f"{context.span_id:016x}",
        "parentSpanId": f"{span.parent.span_id:016x}" if span.parent else "",
        "name": span.name,
        "kind": span.kind.value + 1,
        # 64-bit integers are text in the JSON of protobuf.
        "startTimeUnixNano": str(span.start_time),
        "endTimeUnixNano": str(span.end_time),
        "attributes": _attributes(span.attributes),
    }
    if span.events:
        made["events"] = [
            {
                "timeUnixNano": str(event.timestamp),
                "name": event.name,
                "attributes": _attributes(event.attributes),
            }
            for event in span.events
        ]
    if span.links:
        made["links"] = [
            {
                "traceId": f"{link.context.trace_id:032x}",
                "spanId": f"{link.context.span_id:016x}",
                "attributes": _attributes(link.attributes),
            }
            for link in span.links
        ]
    if span.status.status_code.value:
        made["status"] = {"code": span.status.status_code.value}
        if span.status.description:
            made["status"]["message"] = span.status.description
    return made


def _attributes(attributes: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in (attributes or {}).items()]


def _value(value: Any) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, (list, tuple)):
        return {"arrayValue": {"values": [_value(one) for one in value]}}
    return {"stringValue": str(value)}
