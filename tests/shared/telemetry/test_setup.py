"""Telemetry as a process sets it up: off, exporters, Prometheus, the standard variables."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent import futures
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as trace_grpc

from outrider.shared.config.schema import TelemetryConfig, load
from outrider.shared.core.errors import ConfigError
from outrider.shared.telemetry.metrics import METRICS
from outrider.shared.telemetry.setup import Telemetry


def one_span(telemetry: Telemetry) -> str:
    """Makes a span; returns its trace id."""
    context = telemetry.spans.begin("request", None)
    telemetry.spans.finish("request", context, None, 1, 2, {"outrider.k": 4})
    return context.trace_hex


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    """A collector's trace service; its address, and the requests it got."""
    got: list[Any] = []

    class Service(trace_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:
            got.append(request)
            return trace_pb.ExportTraceServiceResponse()

    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_grpc.add_TraceServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"http://127.0.0.1:{port}", got
    server.stop(None).wait()


def test_off_imports_no_exporter_and_starts_no_thread() -> None:
    code = (
        "import sys, threading\n"
        "from outrider.shared.config.schema import TelemetryConfig\n"
        "from outrider.shared.telemetry.setup import Telemetry\n"
        "t = Telemetry(TelemetryConfig(), 'coordinator')\n"
        "assert not (t.tracing or t.metering)\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
        "bad = [m for m in sys.modules if 'exporter' in m and 'outrider' not in m]\n"
        "assert not bad and 'prometheus_client' not in sys.modules, bad\n"
        "t.shutdown()\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)


def test_otlp_grpc_reaches_a_collector(collector: tuple[str, list[Any]]) -> None:
    endpoint, got = collector
    telemetry = Telemetry(TelemetryConfig(traces="otlp-grpc", endpoint=endpoint), "base")
    trace_id = one_span(telemetry)
    telemetry.shutdown()
    (resource,) = got[0].resource_spans
    attributes = {one.key: one.value for one in resource.resource.attributes}
    assert attributes["service.name"].string_value == "outrider-verify"
    (span,) = resource.scope_spans[0].spans
    assert span.trace_id.hex() == trace_id


def test_otlp_http_reaches_a_collector() -> None:
    bodies: list[tuple[str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        telemetry = Telemetry(
            TelemetryConfig(traces="otlp-http", metrics="otlp-http", endpoint=endpoint), "draft"
        )
        trace_id = one_span(telemetry)
        telemetry.shutdown()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    by_path = dict(bodies)
    assert set(by_path) == {"/v1/traces", "/v1/metrics"}
    request = trace_pb.ExportTraceServiceRequest.FromString(by_path["/v1/traces"])
    assert request.resource_spans[0].scope_spans[0].spans[0].trace_id.hex() == trace_id


def test_file_and_console_write_one_json_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "spans.jsonl"
    telemetry = Telemetry(
        TelemetryConfig(traces="file,console", metrics="file", file=str(path)), "draft"
    )
    trace_id = one_span(telemetry)
    telemetry.shutdown()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    spans = next(line for line in lines if "resourceSpans" in line)
    (span,) = spans["resourceSpans"][0]["scopeSpans"][0]["spans"]
    assert span["traceId"] == trace_id
    assert span["attributes"] == [{"key": "outrider.k", "value": {"intValue": "4"}}]
    assert any("resource_metrics" in line for line in lines)
    assert json.loads(capsys.readouterr().err)["context"]["trace_id"] == "0x" + trace_id


def test_file_spans_are_otlp_json(tmp_path: Path) -> None:
    from google.protobuf import json_format

    path = tmp_path / "spans.jsonl"
    telemetry = Telemetry(TelemetryConfig(traces="file", file=str(path)), "draft")
    one_span(telemetry)
    telemetry.shutdown()
    line = json.loads(path.read_text())
    # OTLP writes ids in hexadecimal where protobuf's JSON has base64; the rest must parse.
    for span in line["resourceSpans"][0]["scopeSpans"][0]["spans"]:
        for key in ("traceId", "spanId", "parentSpanId"):
            del span[key]
    parsed = json_format.ParseDict(line, trace_pb.ExportTraceServiceRequest())
    assert parsed.resource_spans[0].scope_spans[0].spans[0].attributes[0].value.int_value == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"traces": "file"}, "telemetry.file is not set"),
        ({"traces": "file", "file": "/no/such/folder/x"}, "folder does not exist"),
    ],
)
def test_what_can_not_work_is_told(changes: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Telemetry(TelemetryConfig(**changes), "draft")  # type: ignore[arg-type]


@pytest.mark.parametrize("kinds", ["otlp", "file,", ",file", "none,file", ""])
def test_unknown_exporters_are_refused(kinds: str) -> None:
    with pytest.raises(ConfigError, match="otlp-grpc"):
        TelemetryConfig(traces=kinds)


def test_prometheus_port_in_use_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
            Telemetry(TelemetryConfig(prometheus_draft=port), "draft")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_every_metric_passes_promtool() -> None:
    telemetry = Telemetry(
        TelemetryConfig(prometheus_coordinator=0, traces="console"), "coordinator"
    )
    try:
        observed = {"process.memory.usage", "process.cpu.time"}
        for metric in METRICS:
            if metric.name in observed or metric.name.startswith("otel."):
                continue  # the process observes these itself
            values = [f"v{index}" for index in range(len(metric.attributes))]
            attributes = dict(zip(metric.attributes, values, strict=True))
            if metric.kind == "counter":
                telemetry.instruments.counter(metric.name).add(2, *values)
            elif metric.kind == "histogram":
                telemetry.instruments.histogram(metric.name).record(0.01, attributes)
            else:
                telemetry.instruments.observe(
                    metric.name,
                    lambda attributes=attributes: [(0.5, attributes)],  # type: ignore[misc]
                )
        assert telemetry.prometheus is not None
        url = f"http://127.0.0.1:{telemetry.prometheus.port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read()
    finally:
        telemetry.shutdown()
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, timeout=60
    )
    assert checked.returncode == 0, checked.stderr.decode() + checked.stdout.decode()
    families = [line for line in text.decode().splitlines() if line.startswith("# TYPE")]
    assert len(families) == len(METRICS) + 1  # and target_info


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, {"traces": "none", "metrics": "none"}),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, {"traces": "otlp-grpc", "metrics": "none"}),
        ({"OTEL_TRACES_EXPORTER": "none"}, {"traces": "none"}),
        ({"OTEL_TRACES_EXPORTER": "console,otlp"}, {"traces": "console,otlp-grpc"}),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"},
            {"traces": "otlp-grpc", "metrics": "otlp-grpc", "endpoint": None},
        ),
        (
            {
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            },
            {"traces": "otlp-http", "metrics": "none"},
        ),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_SDK_DISABLED": "true"},
            {"traces": "none", "metrics": "none"},
        ),
        (
            {"OTEL_METRICS_EXPORTER": "prometheus", "OTEL_EXPORTER_PROMETHEUS_PORT": "9500"},
            {"prometheus_coordinator": 9500, "prometheus_base": 9501, "prometheus_draft": 9502},
        ),
        ({"OTEL_SERVICE_NAME": "shop"}, {"service_name": "shop"}),
        (
            {"OTEL_TRACES_EXPORTER": "otlp", "OUTRIDER_TELEMETRY_TRACES": "console"},
            {"traces": "console"},
        ),
    ],
)
def test_standard_variables_switch_it_on(
    variables: dict[str, str], wanted: dict[str, object]
) -> None:
    telemetry = load(environment=variables).telemetry
    assert {key: getattr(telemetry, key) for key in wanted} == wanted


def test_standard_variables_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="OTEL_TRACES_EXPORTER"):
        load(environment={"OTEL_TRACES_EXPORTER": "zipkin"})


def test_sampler_comes_from_the_standard_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    telemetry = Telemetry(TelemetryConfig(traces="console"), "draft")
    assert not telemetry.spans.begin("request", None).sampled
    telemetry.shutdown()
    telemetry = Telemetry(TelemetryConfig(traces="console", sample_ratio=1.0), "draft")
    assert telemetry.spans.begin("request", None).sampled
    telemetry.shutdown()
