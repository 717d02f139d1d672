"""The plain study beside transformers: the same prompts, and a verdict that can't flatter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from outrider.coordinator.bench import command
from outrider.coordinator.bench.studies import peers
from outrider.coordinator.bench.workload import summary
from outrider.coordinator.cli.main import main


@pytest.mark.parametrize("drafted", ["by a model", "from the text"])
def test_bench_measures_transformers_beside_its_own(
    drafted: str,
    tiny_base: Path,
    tiny_draft: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All processes for real; no time is looked at."""
    place = tmp_path / "figures.json"
    words = "--ks 0,2 --prompts 2 --prompt-tokens 9 --max-new-tokens 12 --repeats 1 --warmup 0"
    draft, other = {
        "by a model": (str(tiny_draft), peers.ASSISTED),
        "from the text": ("ngram", peers.LOOKUP),
    }[drafted]
    models = ["--base", str(tiny_base), "--draft", draft, "--dtype", "float32"]
    models += ["--device", "cpu"]
    assert main(["bench", "--peers", *models, *words.split(), "--json", str(place)]) == 0
    out = capsys.readouterr().out
    for name in ("| transformers ", f"| {other} ", "against alone"):
        assert name in out
    figures = json.loads(place.read_text())
    assert [one["name"] for one in figures["peers"]] == [peers.ALONE, other]
    # Greedy float32: the same text from every one of them.
    assert all(one["same_tokens_as_base"] for one in figures["variants"] + figures["peers"])
    assert all(one["tokens_per_second"] > 0 for one in figures["peers"])


def run(seconds: float, outputs: Any = ((1, 2),)) -> Any:
    from outrider.coordinator.bench.workload import Run

    return Run(seconds=seconds, tokens=100, outputs=list(outputs))


def figures(base: float, speculation: float, alone: float, assisted: float) -> dict[str, Any]:
    """What ``measure`` returns where each takes so many seconds for the same work."""
    fastest = [run(min(base, alone))]
    return {
        "variants": [
            summary(k, [run(seconds)], [run(base)], fastest)
            for k, seconds in ((0, base), (3, speculation))
        ],
        "peers": [
            {"name": name, **summary(None, [run(seconds)], [run(base)], fastest)}
            for name, seconds in ((peers.ALONE, alone), (peers.ASSISTED, assisted))
        ],
    }


@pytest.mark.parametrize(
    ("seconds", "verdict"),
    [
        ((2.0, 1.0, 4.0, 8.0), "K = 3: 2.00 times the faster of the two that run the base alone, "
         "4.00 times transformers."),
        ((1.0, 2.0, 4.0, 8.0), "No speed-up by speculation; the base alone is 4.00 times "
         "transformers."),
        # Twice as fast as our own base, and slower than the plain library.
        ((4.0, 2.0, 1.0, 3.0), "No speed-up: transformers is faster than K = 3, 2.00 times."),
        ((4.0, 2.0, 3.0, 1.0), "No speed-up: transformers, assisted is faster than K = 3, "
         "2.00 times."),
    ],
)  # fmt: skip
def test_bench_calls_nothing_a_speed_up_that_is_slower_than_the_library(
    seconds: tuple[float, ...], verdict: str
) -> None:
    assert command._verdict(figures(*seconds)) == verdict


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--target", "127.0.0.1:1"], "--target does not say which"),
        (["--in-process"], "not with --in-process"),
        (["--concurrency", "2"], "--concurrency: got 2; with --peers it must be 1"),
    ],
)
def test_peers_are_refused_where_they_can_not_be_compared(
    words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--peers", *words]) == 2
    assert reason in capsys.readouterr().err


def test_repetitive_prompts_have_a_text_three_times_and_begin_it_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts, made = command.prompts(4, None), command.repetitive_prompts(4)
    assert len(made) == 4
    for text, prompt in zip(texts, made, strict=True):
        *whole, begun = prompt.split(f"{text}\n\n")
        assert whole == [""] * 3 and begun and str(text).startswith(begun)
    assert main(["bench", "--repetitive", "--prompt-tokens", "9"]) == 2
    assert "--repetitive: such prompts are code" in capsys.readouterr().err
