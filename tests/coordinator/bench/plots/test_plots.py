"""``outrider bench plot``: SVG that holds what was measured, and is the same every time."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from outrider.coordinator.bench.plots import command
from outrider.shared.core.errors import ConfigError

ROOT = Path(__file__).parents[4]
DATA, PLOTS = ROOT / "docs/results/data", ROOT / "docs/results/plots"
MACHINE = {"processor": "P", "cores": 2, "versions": {"torch": "2.0", "transformers": "5.0"}}
ARENA = {
    "hardware": MACHINE,
    "rollback": [{"rejected": 1, "seconds": 4e-7}, {"rejected": 4096, "seconds": 4.1e-7}],
    "admission": [{"live": 10, "admit": 2e-6, "free": 1.25e-6}],
    "fragmentation": [{"sizes": "skewed", "used": 0.765, "ideal": 0.991}],
    "appending": [
        {"cache": name, "batch": batch, "length": length, "append": cost, "step": 1, "memory": held}
        for batch in (1, 8)
        for length in (256, 4096)
        for name, cost, held in (
            ("arena, llama path", 3.71e-5, 0),
            ("DynamicCache", 0.00432, 5 << 20),
            ("StaticCache", 6.5e-5, None),
        )
    ],
    "model": {"layers": 4, "hidden": 512, "dtype": "torch.float32", "device": "cpu"},
}
STEP = {
    "hardware": MACHINE,
    "device": "Some GPU",
    "model": {"name": "planted:tiny", "runner": "cuda", "dtype": "bfloat16"},
    "copy_bandwidth": 4e12,
    "figures": [
        {"kind": kind, "sequences": count, "rows": rows, "seconds": 0.002, "share": share}
        | {"rate": count / 0.002}
        for kind, count, rows, share in (
            ("decode", 8, 1, 0.67),
            ("verify", 1, 5, 0.71),
            ("draft loop", 1, 4, 0.77),
        )
    ],
    "parts": [
        {"name": "norm + head", "launches": 1, "weight_bytes": 788_000_000, "seconds": 2e-4},
        {"name": "attention", "launches": 28, "weight_bytes": 0, "seconds": 1.327e-4},
    ],
}
BENCH = {
    "hardware": MACHINE,
    "base": {"dtype": "float32", "device": "cpu"},
    "workload": {"max_new_tokens": 9, "temperature": 0.0, "concurrency": 1, "repeats": 2},
    "variants": [
        {
            "k": k,
            "tokens_per_second": rate,
            "tokens_per_second_runs": [rate - 1, rate + 1],
            "speedup": rate / 100,
            "round_ms": {"draft": 1.0, "verify": 2.5, "overhead": 0.75},
        }
        for k, rate in ((0, 100.0), (3, 133.0), (None, 121.0))
    ],
}
LINKS = {
    "hardware": MACHINE,
    "device": "cpu",
    "prompts": 2,
    "max_new_tokens": 9,
    "repeats": 3,
    "bare": [
        {"link": "grpc, two exchanges", "median": 5.89e-4, "p99": 1.2e-3, "rounds": 9},
        {"link": "shm", "median": 8.4e-5, "p99": 1.53e-4, "rounds": 9},
    ],
    "variants": [
        {
            "link": link,
            "k": k,
            "tokens_per_second": rate,
            "round_ms": {"draft": 1.0 * k, "verify": 2.5, "overhead": overhead},
        }
        for link, k, rate, overhead in (
            ("grpc", 3, 215.0, 1.75),
            ("shm", 3, 252.0, 0.5),
            ("grpc", 0, 157.0, 1.0),
        )
    ],
}
TIMELINE = {
    "hardware": MACHINE,
    "device": "Some GPU",
    "cuda_mps": True,
    "k": 3,
    "timelines": [
        {
            "link": link,
            "turns": [
                {"service": "draft", "begin": 0.0, "end": 3.0},
                {"service": "verify", "begin": 3.0 + wait, "end": 10.0},
            ],
        }
        for link, wait in (("grpc", 2.0), ("shm", 1.0))
    ],
}
ADAPTIVE = {
    "hardware": MACHINE,
    "base": "paced:step=8ms",
    "draft": "paced:step=1ms",
    "device": "cpu",
    "max_new_tokens": 9,
    "repeats": 2,
    "points": [
        {"agreement": agreement, "sequences": count, "ratio": ratio, "speedup": 2 * ratio}
        for agreement, count, ratio in (
            ("0.8", 1, 0.99), ("0.8", 32, 0.87), ("0.2/0.95", 1, 1.01), ("0.2/0.95", 32, 1.04),
        )
    ],
}  # fmt: skip

SERVE = {
    "hardware": MACHINE,
    "workload": {"prompt_tokens": "uniform:4-9", "max_new_tokens": "128"},
    "levels": [
        {
            "load": {"rate": rate, "concurrency": concurrency},
            "completed": completed,
            "output_tokens_per_second": 612.4,
            "ttft": {"p50": 0.0211, "p99": 0.4},
            "tpot": {"p50": 0.0014, "p99": 0.0025} if concurrency else None,
        }
        for rate, concurrency, completed in ((None, 16, 9), (4.0, None, 8), (9.0, None, 0))
    ],
}


@pytest.fixture(autouse=True)
def _matplotlib() -> None:
    pytest.importorskip("matplotlib")


def words(text: str) -> set[str]:
    """The words of a well-formed SVG that needs nothing from elsewhere."""
    tree = ElementTree.fromstring(text)
    assert tree.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(text.encode()) < 60_000
    for element in tree.iter():
        for name, value in element.attrib.items():
            if name.endswith("href") or "url(" in value:
                assert value.startswith(("#", "url(#")) or "url(#" in value, value
    # Lines of one label, as "133" over "1.33×", are elements of their own.
    return {"".join(e.itertext()).strip() for e in tree.iter("{http://www.w3.org/2000/svg}text")}


def drawn(figures: dict[str, Any], folder: Path) -> dict[str, str]:
    file = folder / "some.json"
    file.write_text(json.dumps(figures))
    return command.render(file)


def test_arena_plots_hold_series_and_numbers(tmp_path: Path) -> None:
    plots = drawn(ARENA, tmp_path)
    assert list(plots) == ["some-bookkeeping.svg", "some-append.svg", "some-memory.svg"]
    bookkeeping, append, memory = (words(text) for text in plots.values())
    assert {"rollback", "goal: 1 µs", "admit", "free", "arena", "ideal packer"} <= bookkeeping
    assert {"0.40", "0.41", "4k", "2.00", "1.25", "skewed", "76.5", "99.1"} <= bookkeeping
    caches = {"arena, llama path", "DynamicCache", "StaticCache", "1 sequence", "8 sequences"}
    assert caches | {"256", "4,096", "37.1", "4,320", "65.0"} <= append
    assert caches | {"0", "5.00", "-"} <= memory


def test_arena_plots_without_a_model_are_of_bookkeeping_alone(tmp_path: Path) -> None:
    figures = {key: value for key, value in ARENA.items() if key not in ("appending", "model")}
    assert list(drawn(figures, tmp_path)) == ["some-bookkeeping.svg"]


def test_step_plots_hold_series_and_numbers(tmp_path: Path) -> None:
    plots = drawn(STEP, tmp_path)
    assert list(plots) == ["some-share.svg", "some-operations.svg"]
    share, operations = (words(text) for text in plots.values())
    assert {"decode, 8 sequences", "verify, 1 sequence of 5 rows", "draft loop, K = 4"} <= share
    assert "67%: 2.000 ms, 4,000 tokens/s" in share
    assert {"norm + head (1×)", "attention (28×)", "788.0", "200.0", "98%"} <= operations
    assert {"132.7", "no weights"} <= operations  # it reads none, so it has no share


def test_bench_plots_hold_series_and_numbers(tmp_path: Path) -> None:
    plots = drawn(BENCH, tmp_path)
    assert list(plots) == ["some.svg"]
    found = words(plots["some.svg"])
    assert {"draft", "verify", "overhead", "each run", "0", "3", "auto", "100", "4.25"} <= found
    assert any("133" in word for word in found) and any("1.33×" in word for word in found)


def test_link_plots_hold_series_and_numbers(tmp_path: Path) -> None:
    plots = drawn(LINKS, tmp_path)
    assert list(plots) == ["some-rounds.svg", "some-bare.svg"]
    rounds, bare = (words(text) for text in plots.values())
    assert {"draft", "verify", "overhead", "grpc, K = 0", "grpc, K = 3", "shm, K = 3"} <= rounds
    assert {"7.25 ms, 215 tokens/s", "6.00 ms, 252 tokens/s"} <= rounds
    assert {"grpc, two exchanges", "shm", "589, p99 1,200", "84, p99 153"} <= bare


def test_timeline_plot_holds_lanes_and_shares(tmp_path: Path) -> None:
    plots = drawn(TIMELINE, tmp_path)
    assert list(plots) == ["some.svg"]
    found = words(plots["some.svg"])
    assert {"grpc: draft", "grpc: base", "shm: draft", "shm: base", "30%"} <= found
    assert {"50%, neither 20%", "60%, neither 10%"} <= found
    assert any("with CUDA MPS" in word for word in found)


def test_adaptive_plot_holds_series_and_their_worst(tmp_path: Path) -> None:
    plots = drawn(ADAPTIVE, tmp_path)
    assert list(plots) == ["some.svg"]
    found = words(plots["some.svg"])
    assert {"0.87 at worst, agreement 0.8", "1.01 at worst, agreement 0.2/0.95"} <= found
    assert {"1", "32", "sequences", "against K = 0"} <= found
    points = [{**one, "agreement": None} for one in ADAPTIVE["points"][:2]]
    (plot,) = drawn({**ADAPTIVE, "points": points}, tmp_path).values()
    assert "0.87 at worst" in words(plot)


def test_serve_plot_holds_levels_that_were_served(tmp_path: Path) -> None:
    plots = drawn(SERVE, tmp_path)
    assert list(plots) == ["some.svg"]
    found = words(plots["some.svg"])
    assert {"16", "at once", "4/s", "half within", "99 % within", "-"} <= found
    assert {"612", "21.1", "400", "1.40", "2.50"} <= found
    assert "9/s" not in found
    assert any("prompt tokens: uniform:4-9" in word and "17 answers" in word for word in found)


def test_every_colour_of_text_and_ground_has_one_for_dark_screens(tmp_path: Path) -> None:
    from outrider.coordinator.bench.plots.drawing import SERIES

    for figures in (ARENA, STEP, BENCH, LINKS, TIMELINE, ADAPTIVE, SERVE):
        for text in drawn(figures, tmp_path).values():
            rules = text[text.index("@media (prefers-color-scheme: dark)") :].split("</style>")[0]
            used = set(re.findall(r'style="[^"]*?(?:fill|stroke): (#\w{6})', text))
            for colour in used - set(SERIES):
                assert f'[style*="fill: {colour}"]' in rules


def test_the_same_figures_give_the_same_bytes(tmp_path: Path) -> None:
    import matplotlib

    first = drawn(ARENA, tmp_path)
    with matplotlib.rc_context({"font.size": 20, "axes.grid": False}):  # settings of the user's own
        assert drawn(ARENA, tmp_path) == first


def test_the_committed_plots_are_those_of_the_committed_figures() -> None:
    import matplotlib

    pin = re.search(r"^matplotlib==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pin is not None
    if matplotlib.__version__ != pin[1]:
        pytest.skip(f"the committed plots are of matplotlib {pin[1]}")
    plots: dict[str, str] = {}
    for file in sorted(DATA.glob("*.json")):
        plots |= command.render(file)
    for name, text in plots.items():
        assert len(words(text)) > 10, name
        held = (PLOTS / name).read_text(encoding="utf-8")
        assert held == text, f"{name}: outrider bench plot docs/results/data --out {PLOTS}"
    assert sorted(plots) == sorted(path.name for path in PLOTS.iterdir())


def test_the_study_writes_files_and_prints_their_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.json").write_text(json.dumps(BENCH))
    (tmp_path / "two.json").write_text(json.dumps(STEP))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    out = tmp_path / "new" / "plots"
    assert command.run(parser.parse_args([str(tmp_path), "--out", str(out)])) == 0
    names = ["one.svg", "two-operations.svg", "two-share.svg"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert sorted(capsys.readouterr().out.split()) == [str(out / name) for name in names]


@pytest.mark.parametrize("text", ["[]", "{}", '{"hardware": {}}', "not JSON", None])
def test_other_files_are_refused_by_name(text: str | None, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=r"other\.json"):
        command.render(file)


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"outrider\[plots\]"):
        drawn(BENCH, tmp_path)
