"""``outrider bench serve`` as a user runs it, against a server that streams as OpenAI's does."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from outrider.coordinator.cli import main
from outrider_testing.openai_server import openai_server


def test_bench_serve_measures_every_level(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "serve.json"
    words = ["bench", "serve", "--num-requests", "12", "--warmup", "2", "--concurrency", "1,4"]
    words += ["--prompt-tokens", "uniform:4-9", "--max-new-tokens", "uniform:2-5"]
    words += ["--slo", "ttft=60,e2e=60", "--json", str(written)]
    # Numbers count from 0 and go on: two of the warm-up, twelve, two, and then the second level.
    with openai_server({5: "busy", 20: "cut"}) as server:
        assert main.main([*words, "--url", f"{server.url}/v1/"]) == 0
    figures = json.loads(written.read_text())
    first, second = figures["levels"]
    assert (first["load"]["concurrency"], second["load"]["concurrency"]) == (1, 4)
    assert first["failures"] == {"HTTP 503": 1} and second["failures"] == {"ended early": 1}
    assert first["completed"] == second["completed"] == 11
    for level in (first, second):
        # All answers that came kept limits as wide as these.
        assert level["goodput_per_second"] == level["requests_per_second"] > 0
        assert level["ttft"]["count"] == 11 and level["prompt_tokens"] == 77
        assert level["send_late"] is None
    assert figures["target"] == {"api": "completions", "url": server.url, "model": "small"}
    assert figures["workload"]["prompt_tokens"] == "uniform:4-9"
    assert {"hardware", "command"} <= figures.keys()
    assert len(server.bodies) == 2 * (2 + 12)
    # The same lengths at both levels, other prompts.
    bodies = server.bodies[2:14], server.bodies[16:]
    lengths = [sorted((len(b["prompt"]), b["max_tokens"]) for b in level) for level in bodies]
    assert lengths[0] == lengths[1]
    assert all(4 <= tokens <= 9 and 2 <= new <= 5 for tokens, new in lengths[0])
    shown = capsys.readouterr()
    assert "1 failed, HTTP 503: too many requests" in shown.out
    assert shown.err == ""  # progress is for terminals


def test_bench_serve_at_a_rate_follows_the_seed(tmp_path: Path) -> None:
    def bodies(seed: str) -> list[dict[str, Any]]:
        written = tmp_path / "serve.json"
        words = ["bench", "serve", "--rate", "500", "--num-requests", "9", "--warmup", "0"]
        words += ["--prompt-tokens", "5", "--max-new-tokens", "2", "--seed", seed]
        with openai_server() as server:
            assert main.main([*words, "--url", server.url, "--json", str(written)]) == 0
        (level,) = json.loads(written.read_text())["levels"]
        assert level["load"] == {"rate": 500.0, "concurrency": None}
        assert level["send_late"]["count"] == 9
        return sorted(server.bodies, key=lambda one: one["prompt"])

    assert bodies("1") == bodies("1") != bodies("2")


def test_bench_serve_replays_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = tmp_path / "requests.jsonl"
    lines = [{"prompt": f"text {n}", "max_new_tokens": n + 1, "at": 0.02 * n} for n in range(5)]
    requests.write_text("\n".join(json.dumps(one) for one in lines))
    words = ["bench", "serve", "--requests", str(requests), "--warmup", "1"]
    with openai_server() as server:
        assert main.main([*words, "--url", server.url, "--no-ignore-eos"]) == 0
        asked = {(one["prompt"], one["max_tokens"]) for one in server.bodies[1:]}
        assert asked == {(f"text {n}", n + 1) for n in range(5)}
        assert "ignore_eos" not in server.bodies[0]
        assert "file's times" in capsys.readouterr().out
        # Loads of one's own go before the file's times.
        own = ["--concurrency", "2", "--rate", "500"]
        assert main.main([*words, "--url", server.url, *own]) == 0
        shown = capsys.readouterr().out
        assert "2 at once" in shown and "500/s" in shown and "file's times" not in shown


def test_bench_serve_stops_where_the_whole_warmup_fails(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with openai_server(dict.fromkeys(range(9), "busy")) as server:
        assert main.main(["bench", "serve", "--url", server.url, "--warmup", "3"]) == 1
    assert len(server.bodies) == 3
    assert "every warm-up request failed, HTTP 503: too many requests" in capsys.readouterr().err


def test_bench_serve_fails_where_no_request_of_a_level_was_answered() -> None:
    with openai_server(dict.fromkeys(range(9), "busy")) as server:
        words = ["bench", "serve", "--url", server.url, "--warmup", "0", "--num-requests", "3"]
        assert main.main(words) == 1


def test_bench_serve_interrupted_shows_the_figures_so_far(
    tmp_path: Path, spawn: Callable[..., Any]
) -> None:
    written = tmp_path / "serve.json"
    with openai_server({6: "hang", 7: "hang"}) as server:
        words = ["--url", server.url, "--concurrency", "2", "--max-new-tokens", "3"]
        process = spawn(
            "outrider.coordinator.cli.main",
            "bench",
            "serve",
            *words,
            "--warmup",
            "2",
            "--json",
            written,
        )
        while len(server.bodies) < 8 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "2 at once: interrupted with 2 requests under way" in out
    (level,) = json.loads(written.read_text())["levels"]
    assert (level["completed"], level["failed"], level["unfinished"]) == (4, 0, 2)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--rate", "0"], "--rate: got '0'; must be a number > 0"),
        (["--rate", "2,x"], "--rate: got 'x'; must be a number > 0"),
        (["--concurrency", "0"], "--concurrency: got '0'; must be a whole number >= 1"),
        (["--num-requests", "no"], "--num-requests: got 'no'; must be a whole number >= 1"),
        (["--prompt-tokens", "uniform:9"], "--prompt-tokens: got 'uniform:9'; must be a number of"),
        (["--slo", "p99=1"], "--slo: got 'p99=1'; must be NAME=SECONDS"),
        (["--url", "host:80"], "--url: got 'host:80'; must begin with http:// or https://"),
        (["--header", "x"], "--header: got 'x'; must be NAME:VALUE"),
        (["--body", "[]"], "--body: got '[]'; must be a JSON object"),
        (["--model", "m"], "--model: got 'm'; must be given with --url"),
        (["--url", "http://x", "--target", "y"], "--target: got 'y'; must be left out with --url"),
        (["--url", "http://x", "--k", "2"], "--k: got 2; must be left out with --url"),
        (["--requests", "f", "--prompt-tokens", "5"], "--prompt-tokens: got '5'; must be left out"),
        (["--json", "/gone/x.json"], "--json: got '/gone/x.json'; must be a file in a folder"),
        (["--requests", "/gone.jsonl"], "--requests: /gone.jsonl can't be read"),
    ],
)
def test_bench_serve_names_the_flag_that_is_wrong(
    flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main.main(["bench", "serve", *flags])
    except SystemExit as stop:
        status = int(str(stop.code))
    assert status == 2
    said = re.sub(r"argument (--[\w-]+)", r"\1", capsys.readouterr().err)
    assert says in said


def test_bench_serve_names_the_extra_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    assert main.main(["bench", "serve", "--url", "http://127.0.0.1:1"]) == 2
    assert "pip install 'outrider[http]'" in capsys.readouterr().err
