"""The three Prometheus endpoints, read by a real Prometheus server."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from outrider.shared.telemetry.metrics import ALL, COORDINATOR, METRICS, SERVICES

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="Prometheus is not installed"
)


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as answer:
        body: bytes = answer.read()
    return body


def ports(cluster: Any) -> dict[str, int]:
    telemetry = cluster.config.telemetry
    return {
        role: getattr(telemetry, f"prometheus_{role}") for role in ("coordinator", "base", "draft")
    }


@pytest.fixture(scope="module")
def query(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Asks a Prometheus that scrapes the cluster."""
    import socket

    cluster.generate(tokens=16)
    folder: Path = tmp_path_factory.mktemp("prometheus")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    jobs = [
        {"job_name": role, "static_configs": [{"targets": [f"127.0.0.1:{at}"]}]}
        for role, at in ports(cluster).items()
    ]
    # JSON is YAML.
    (folder / "prometheus.yml").write_text(
        json.dumps({"global": {"scrape_interval": "500ms"}, "scrape_configs": jobs})
    )
    server = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def ask(expression: str, *, enough: Callable[[list[Any]], bool] = bool) -> list[Any]:
        """The result of an expression, once it is ``enough``."""
        path = f"/api/v1/query?query={urllib.parse.quote(expression)}"
        until, found = time.monotonic() + 60, []
        while time.monotonic() < until:
            try:
                answer = json.loads(get(f"http://127.0.0.1:{port}{path}"))
            except OSError:  # not up yet
                time.sleep(0.2)
                continue
            found = answer["data"]["result"]
            if enough(found):
                return found
            time.sleep(0.3)
        raise AssertionError(f"{expression}: {found}")

    try:
        yield ask
    finally:
        server.terminate()
        server.wait(20)


def test_prometheus_finds_all_three_processes(query: Callable[..., Any]) -> None:
    up = query("up == 1", enough=lambda found: len(found) == 3)
    assert {one["metric"]["job"] for one in up} == {"coordinator", "base", "draft"}
    names = query("target_info", enough=lambda found: len(found) == 3)
    assert {one["metric"]["service_name"] for one in names} == {
        "outrider-coordinator",
        "outrider-verify",
        "outrider-draft",
    }


def test_prometheus_has_what_the_client_was_told(cluster: Any, query: Callable[..., Any]) -> None:
    def value(expression: str) -> float:
        return float(query(expression)[0]["value"][1])

    def counts() -> dict[str, float]:
        return {
            "requests": value("sum(outrider_requests_total)"),
            "proposed": value("sum(outrider_tokens_proposed_total)"),
            "accepted": value("sum(outrider_tokens_accepted_total)"),
            "emitted": value("sum(outrider_tokens_emitted_total)"),
            "draft_rows": value('sum(outrider_service_rows_total{job="draft"})'),
            "verify_rows": value('sum(outrider_service_rows_total{job="base"})'),
        }

    def scraped() -> None:
        """Waits until all three were asked again, twice: the first time may have begun before."""
        for _ in range(2):
            query(f"min(timestamp(up)) > {time.time()}")

    scraped()
    before = counts()
    ids, finished, _ = cluster.generate(tokens=32)
    scraped()
    grown = {key: amount - before[key] for key, amount in counts().items()}
    assert grown["requests"] == 1
    assert grown["proposed"] == finished.speculation.proposed
    assert grown["accepted"] == finished.speculation.accepted
    assert grown["emitted"] == len(ids) == 32
    assert grown["verify_rows"] >= finished.speculation.proposed + finished.speculation.rounds
    assert grown["draft_rows"] >= finished.speculation.proposed


@pytest.mark.parametrize(
    "expression",
    [
        "histogram_quantile(0.5, sum by (le) (gen_ai_server_time_to_first_token_seconds_bucket))",
        "histogram_quantile(0.99, sum by (le) (outrider_round_duration_seconds_bucket))",
        "outrider_acceptance_rate",
        "outrider_accepted_length_mean",
        "outrider_speculation_length",
        'outrider_arena_occupancy{job="base"}',
        'outrider_service_up{outrider_service="verify"} == 1',
        'outrider_link_in_use{outrider_link="shm"} == 1',
        "outrider_ceiling_share > 0",
        'outrider_failovers_total{outrider_service="draft"}',
    ],
)
def test_prometheus_answers(query: Callable[..., Any], expression: str) -> None:
    assert query(expression)


@pytest.mark.parametrize("role", ["coordinator", "base", "draft"])
def test_endpoint_passes_promtool_and_is_complete(cluster: Any, role: str) -> None:
    cluster.generate(tokens=16)
    cluster.generate(tokens=16, k=None)
    text = get(f"http://127.0.0.1:{ports(cluster)[role]}/metrics")
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    helps = {line.split(" ", 3)[3] for line in text.decode().splitlines() if "# HELP" in line}
    where = {ALL, COORDINATOR} if role == "coordinator" else {ALL, SERVICES}
    wanted = {one.description for one in METRICS if one.where in where}
    # Without a point a metric is not shown: nothing was hidden, lost or refused yet.
    rare = {
        one.description
        for one in METRICS
        if one.name in ("outrider.round.hidden.time", "outrider.service.refusals",
                        "outrider.tokens.wasted")
    }  # fmt: skip
    assert wanted - helps <= rare
    assert helps - wanted == {"Target metadata"}
