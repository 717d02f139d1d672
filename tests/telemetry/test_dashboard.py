"""The deployment's dashboard and configuration against what the processes really expose."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from opentelemetry.exporter.prometheus._mapping import sanitize_attribute

from outrider.shared.config.schema import TelemetryConfig
from outrider.shared.telemetry.metrics import METRICS
from outrider.shared.telemetry.setup import Telemetry

FOLDER = Path(__file__).parents[2] / "deploy" / "observability"
FUNCTIONS = {"sum", "rate", "increase", "histogram_quantile", "by"}


def dashboard() -> dict[str, Any]:
    made: dict[str, Any] = json.loads(
        (FOLDER / "grafana" / "dashboards" / "outrider.json").read_text("utf-8")
    )
    return made


def expressions() -> list[str]:
    return [
        target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())
    ]


def exposed() -> dict[str, set[str]]:
    """Every series that the declared metrics become, with its labels."""
    telemetry = Telemetry(TelemetryConfig(prometheus_draft=0, traces="console"), "draft")
    try:
        for metric in METRICS:
            if metric.name.startswith(("process.", "otel.")):
                continue  # every process observes these itself
            values = ["x"] * len(metric.attributes)
            if metric.kind == "counter":
                telemetry.instruments.counter(metric.name).add(1, *values)
            elif metric.kind == "histogram":
                attributes = dict(zip(metric.attributes, values, strict=True))
                telemetry.instruments.histogram(metric.name).record(1, attributes)
            else:
                attributes = dict(zip(metric.attributes, values, strict=True))
                telemetry.instruments.observe(
                    metric.name,
                    lambda attributes=attributes: [(1, attributes)],  # type: ignore[misc]
                )
        import urllib.request

        assert telemetry.prometheus is not None
        url = f"http://127.0.0.1:{telemetry.prometheus.port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
    finally:
        telemetry.shutdown()
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, rest = line.partition("{")
            labels = re.findall(r"(\w+)=\"", rest)
            found.setdefault(name.split(" ")[0], set()).update(labels)
    return found


def words(expression: str) -> set[str]:
    """Names in an expression: no ranges, numbers or functions."""
    bare = re.sub(r"\[[^]]*\]", "", expression)
    return set(re.findall(r"[a-z_][a-z0-9_]*", bare)) - FUNCTIONS


def test_every_panel_names_metrics_and_labels_that_exist() -> None:
    series = exposed()
    labels = {label for some in series.values() for label in some} | {"role"}
    assert len(expressions()) > 30
    for expression in expressions():
        grouped = re.findall(r"by \(([^)]*)\)", expression)
        by = {one.strip() for group in grouped for one in group.split(",")}
        assert by <= labels, expression
        names = words(re.sub(r"by \([^)]*\)", "", expression))
        assert names and names <= set(series), (expression, names - set(series))


def test_every_panel_shows_something_and_legends_use_labels() -> None:
    series = exposed()
    labels = {label for some in series.values() for label in some} | {"role"}
    for panel in dashboard()["panels"]:
        if panel["type"] == "row":
            continue
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels


def test_every_metric_is_on_the_dashboard() -> None:
    shown = " ".join(expressions())
    for metric in METRICS:
        assert sanitize_attribute(metric.name) in shown, metric.name


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_every_expression_parses(tmp_path: Path) -> None:
    rules = [
        {
            "record": f"panel:{index}",
            "expr": expression.replace("$__rate_interval", "1m").replace("$__range", "15m"),
        }
        for index, expression in enumerate(expressions())
    ]
    path = tmp_path / "rules.json"
    path.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    checked = subprocess.run(["promtool", "check", "rules", path], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_configuration_is_valid() -> None:
    checked = subprocess.run(
        ["promtool", "check", "config", FOLDER / "prometheus.yml"], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_compose_mounts_files_that_exist() -> None:
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    for service in compose["services"].values():
        assert ":" in service["image"] and not service["image"].endswith("latest")
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert (
                (FOLDER / source).exists()
                if source.startswith(".")
                else source in compose["volumes"]
            )


def test_addresses_agree_across_files() -> None:
    collector = yaml.safe_load((FOLDER / "collector.yaml").read_text())
    jaeger = yaml.safe_load((FOLDER / "jaeger.yaml").read_text())
    prometheus = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    sources = yaml.safe_load(
        (FOLDER / "grafana/provisioning/datasources/datasources.yaml").read_text()
    )
    to_jaeger = collector["exporters"]["otlp/jaeger"]["endpoint"]
    assert jaeger["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"] == to_jaeger
    targets = [target for job in prometheus["scrape_configs"]
               for one in job["static_configs"] for target in one["targets"]]  # fmt: skip
    assert collector["exporters"]["prometheus"]["endpoint"] in targets
    roles = [one["labels"]["role"] for one in prometheus["scrape_configs"][0]["static_configs"]]
    assert roles == ["coordinator", "verify", "draft"]
    by_type = {one["type"]: one for one in sources["datasources"]}
    assert jaeger["extensions"]["jaeger_query"]["http"]["endpoint"] in by_type["jaeger"]["url"]
    uids = {one["uid"] for one in sources["datasources"]}
    for panel in dashboard()["panels"]:
        assert panel.get("datasource", {"uid": "prometheus"})["uid"] in uids
