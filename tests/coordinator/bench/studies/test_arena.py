"""``outrider bench arena`` on the smallest settings: it runs, and its figures make sense."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from outrider.coordinator.bench.studies import arena


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    arena.add_arguments(parser)
    return parser.parse_args(list(words))


@pytest.mark.serial
def test_rollback_is_flat_and_below_two_microseconds() -> None:
    few, many = (min(arena.rollback_seconds(n) for _ in range(3)) for n in (1, 16_384))
    assert max(few, many) < 2e-6
    assert many < 2 * few + 1e-7


def test_fragmentation_never_beats_the_ideal_packer() -> None:
    for sizes in ("uniform", "skewed", "bimodal"):
        figures = arena.fragmentation(sizes, tokens=20_000, requests=800)
        assert 0.4 < figures["used"] <= figures["ideal"] <= 1


def test_the_study_prints_tables_and_writes_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena, "LIVE", (10,))
    monkeypatch.setattr(arena, "REJECTED", (1, 16))
    file = tmp_path / "figures.json"
    words = ["--arena-device", "cpu", "--lengths", "32", "--batches", "1,2", "--steps", "2"]
    words += ["--layers", "1", "--hidden", "64", "--json", str(file)]
    assert arena.run(arguments(*words)) == 0
    shown = capsys.readouterr().out
    figures = json.loads(file.read_text())
    assert len(figures["appending"]) == 8
    for name in ("arena, llama path", "DynamicCache", "StaticCache", "ideal packer"):
        assert name in shown
    assert all(entry["step"] > 0 and entry["append"] > 0 for entry in figures["appending"])
