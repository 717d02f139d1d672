"""Section ``[telemetry]`` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass

from outrider.shared.config.setting import Checked, setting

_EXPORTERS = ("otlp-grpc", "otlp-http", "console", "file")
_ALLOWED = f"none, or a comma-separated list of {', '.join(_EXPORTERS)}"


def _known(value: str) -> bool:
    return value == "none" or set(_EXPORTERS).issuperset(value.split(","))


@dataclass(frozen=True)
class TelemetryConfig(Checked):
    """Logs, traces and metrics, section ``[telemetry]``."""

    log_level: str = setting(
        "info", help="least severe level", choices=("debug", "info", "warning", "error")
    )
    log_format: str = setting("text", help="form of log lines", choices=("text", "json"))
    traces: str = setting("none", help="where traces go", allowed=_ALLOWED, check=_known)
    metrics: str = setting(
        "none", help="where metrics go, besides Prometheus", allowed=_ALLOWED, check=_known
    )
    endpoint: str | None = setting(
        None, help="URL of the OTLP collector; none takes OTEL_EXPORTER_OTLP_ENDPOINT"
    )
    file: str | None = setting(None, help="file that the file exporter appends JSON lines to")
    sample_ratio: float | None = setting(
        None,
        help="share of requests traced, where the client did not decide; none takes "
        "OTEL_TRACES_SAMPLER, by default all",
        low=0.0,
        high=1.0,
    )
    span_queue: int = setting(32768, help="finished spans that may wait for export", low=1)
    metrics_seconds: float = setting(10.0, help="time between metric exports", low=0.1)
    prometheus_host: str = setting("127.0.0.1", help="address of the Prometheus endpoints")
    prometheus_coordinator: int | None = setting(
        None, help="port of the coordinator's Prometheus endpoint", low=0, high=65535
    )
    prometheus_base: int | None = setting(
        None, help="port of the verify service's Prometheus endpoint", low=0, high=65535
    )
    prometheus_draft: int | None = setting(
        None, help="port of the draft service's Prometheus endpoint", low=0, high=65535
    )
    service_name: str = setting(
        "outrider", help="service.name is this and the role, such as outrider-draft"
    )
    profile: bool = setting(
        False, help="keep the rounds of recent requests in memory for outrider generate --profile"
    )

    def wanted(self, role: str) -> bool:
        """Whether the process ``role`` (coordinator, base or draft) has traces or metrics on."""
        port = getattr(self, f"prometheus_{role}")
        return not (self.traces == self.metrics == "none" and port is None)
