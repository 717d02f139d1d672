"""Benchmarks with the bundled pair: every way to run a round gives the same tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from outrider.coordinator.bench.studies import bare_links
from outrider.coordinator.cli import main


def test_bench_links_has_the_same_tokens_over_every_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bare_links, "ROUNDS", 50)
    monkeypatch.setattr(bare_links, "WARMUP", 5)
    written = tmp_path / "links.json"
    arguments = ["bench", "links", "--ks", "0,3", "--prompts", "2", "--max-new-tokens", "24"]
    status = main.main([*arguments, "--repeats", "1", "--warmup", "0", "--json", str(written)])
    assert status == 0
    figures = json.loads(written.read_text())
    found = {(one["link"], one["k"]): one for one in figures["variants"]}
    assert set(found) == {(link, k) for link in ("grpc", "shm", "in-process") for k in (0, 3)}
    for one in found.values():
        assert one["same_tokens_as_base"] and one["same_tokens_as_in_process"]
    # Speculation went on over each of them: with K = 3 fewer rounds than tokens.
    for link in ("grpc", "shm", "in-process"):
        assert found[link, 0]["mean_accepted_length"] == 1.0
        assert 1.5 < found[link, 3]["mean_accepted_length"] <= 4.0
    assert found["shm", 3]["acceptance_rate"] == found["grpc", 3]["acceptance_rate"]
    bare = {one["link"]: one for one in figures["bare"]}
    assert set(bare) == {"grpc, two exchanges", "shm", "shm, spinning"}
    for one in bare.values():
        assert one["rounds"] == 50 and 0 < one["median"] <= one["p99"]
    shown = capsys.readouterr().out
    assert "against in-process" in shown and "link alone" in shown


def test_bench_timeline_shows_turns_that_follow_each_other(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "timeline.json"
    arguments = ["bench", "timeline", "--base", str(tiny_base), "--draft", str(tiny_base)]
    arguments += ["--links", "shm", "--prompt-tokens", "9", "--rounds", "5"]
    assert main.main([*arguments, "--max-new-tokens", "60", "--json", str(written)]) == 0
    (shm,) = json.loads(written.read_text())["timelines"]
    assert [one["service"] for one in shm["turns"]] == ["draft", "verify"] * 5
    # Draft and base wait for each other; a span ends a little after its word is sent.
    for before, after in zip(shm["turns"], shm["turns"][1:], strict=False):
        assert before["begin"] < after["begin"] and before["end"] < after["end"]
    assert "neither" in capsys.readouterr().out


def test_bench_in_process_measures_both_models_and_has_the_same_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "bench.json"
    arguments = ["bench", "--in-process", "--ks", "0,3", "--prompts", "2", "--max-new-tokens", "24"]
    assert main.main([*arguments, "--repeats", "2", "--warmup", "0", "--json", str(written)]) == 0
    figures = json.loads(written.read_text())
    assert figures["link"] == "in-process" and figures["base"]["parameters"] > 1e6
    alone, drafted = figures["variants"]
    assert alone["mean_accepted_length"] == 1.0 < drafted["mean_accepted_length"]
    assert drafted["same_tokens_as_base"]
    assert "tokens/s" in capsys.readouterr().out


def test_bench_serve_measures_a_running_coordinator(
    bundled_target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "serve.json"
    arguments = ["bench", "serve", "--target", bundled_target, "--rate", "20", "--warmup", "1"]
    arguments += ["--num-requests", "6", "--max-new-tokens", "8", "--json", str(written)]
    assert main.main(arguments) == 0
    figures = json.loads(written.read_text())
    (level,) = figures["levels"]
    assert figures["target"]["base"]["parameters"] > 1e6
    assert (level["completed"], level["output_tokens"]) == (6, 6 * 8)
    assert level["prompt_tokens"] > 6 * 10 and level["mean_accepted_length"] >= 1.0
    assert 0 < level["ttft"]["p50"] <= level["e2e"]["p50"] <= level["e2e"]["max"]
    assert "first token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "says"),
    [(["--ks", "0,auto"], "--ks auto"), (["--concurrency", "2"], "--concurrency: got 2")],
)
def test_bench_in_process_refuses_what_needs_a_coordinator(
    flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["bench", "--in-process", *flags]) != 0
    assert says in capsys.readouterr().err
