"""The Prometheus endpoint of one process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outrider.shared.core.errors import ConfigError
from outrider.shared.telemetry.exporters import EXTRA

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricReader


class PrometheusEndpoint:
    """Serves ``http://host:port/metrics`` from a daemon thread; binds at once.

    Raises ``ConfigError`` when the port can't be had or the exporter isn't installed.
    """

    def __init__(self, host: str, port: int) -> None:
        """``port`` 0 picks a free one; see ``port``."""
        try:
            from opentelemetry.exporter.prometheus import PrometheusMetricReader
            from prometheus_client import CollectorRegistry, start_http_server
        except ImportError as error:
            raise ConfigError(
                f"telemetry: the Prometheus exporter is not installed ({error}); {EXTRA}"
            ) from None
        registry = CollectorRegistry()
        self.reader: MetricReader = PrometheusMetricReader(
            registry=registry, scope_info_enabled=False
        )
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            raise ConfigError(
                f"telemetry: Prometheus endpoint {host}:{port}: {error.strerror or error}"
            ) from None
        self.port = int(self._server.server_port)

    def close(self) -> None:
        """Stops serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
