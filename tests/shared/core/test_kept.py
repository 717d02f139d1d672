"""What was found out about a machine: used again there, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from outrider.kernels.cpu import compile as kernels
from outrider.shared.core.kept import cache_folder, found
from outrider.shared.model.cpu import threads
from outrider_testing import engines

HERE = {"processor": "znver4 +avx512f", "torch": "2.13.0", "threads": 8}


def test_found_asks_once_for_the_same_circumstances(tmp_path: Path) -> None:
    answers = iter([4, 2])
    assert found(tmp_path, "team", HERE, lambda: next(answers), int) == 4
    assert found(tmp_path, "team", HERE, lambda: next(answers), int) == 4
    for name, other in {"processor": "znver5", "torch": "2.14.0", "threads": 9}.items():
        assert found(tmp_path, "team", HERE | {name: other}, lambda: 7, int) == 7
    assert found(tmp_path, "other", HERE, lambda: next(answers), int) == 2


@pytest.mark.parametrize("damage", ["copied", "cut", "empty", "odd", "no number"])
def test_found_replaces_a_file_that_is_damaged_or_of_another_processor(
    tmp_path: Path, damage: str
) -> None:
    found(tmp_path, "team", HERE, lambda: 4, int)
    (place,) = tmp_path.iterdir()
    if damage == "copied":
        # By its name it is for here; what it holds says otherwise.
        whole = json.loads(place.read_text())
        whole["circumstances"]["processor"] = "skylake"
        place.write_text(json.dumps(whole))
    else:
        text = place.read_text()
        damaged = {"cut": text[:-4], "empty": "", "odd": "[1, 2]"}
        damaged["no number"] = text.replace('"found": 4', '"found": "many"')
        place.write_text(damaged[damage])
    assert found(tmp_path, "team", HERE, lambda: 2, int) == 2
    assert found(tmp_path, "team", HERE, lambda: 9, int) == 2


def test_found_goes_on_where_nothing_can_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert found(tmp_path / "file" / "below", "team", HERE, lambda: 3, int) == 3


def test_cache_folder_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/outrider")
    assert cache_folder("/else/where") == Path("/else/where")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder().is_relative_to(Path.home())


def test_threads_takes_more_threads_only_where_they_pay() -> None:
    best = threads.smallest_of_the_best
    assert best({1: 4e-3, 2: 2.1e-3, 4: 1.2e-3, 8: 1.0e-3}) == 4
    assert best({1: 4e-3, 2: 3.5e-3, 4: 2.4e-3}) == 4
    # Saves a third, and that is too little to wake a thread for.
    assert best({1: 2.1e-4, 2: 1.4e-4}) == 1
    assert best({1: 0.2, 2: 0.3, 4: 0.5}) == 1


def test_threads_is_tried_once_and_again_on_another_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    tried: list[int] = []

    def timed(runner: object, size: int) -> float:
        tried.append(size)
        return {1: 3.0, 2: 1.0, 3: 2.0}[size]

    monkeypatch.setattr(threads, "_time", timed)

    def made() -> str:
        runner = engines.runner(engines.tiny_llama(), runner="cpu", cache_dir=str(tmp_path))
        return runner.facts.kernels

    assert "2 of 3 threads" in made()
    assert tried == [1, 2, 3]
    assert "2 of 3 threads" in made()
    assert tried == [1, 2, 3]
    monkeypatch.setattr(threads, "processor", lambda: "another")
    assert "2 of 3 threads" in made()
    assert tried == [1, 2, 3] * 2
    monkeypatch.setattr(kernels, "processor_name", lambda: "named")
    assert made().startswith("compiled for named, ")


def test_threads_times_the_forward_and_leaves_the_arena_as_it_was() -> None:
    runner = engines.runner(engines.tiny_llama(), runner="cpu", threads=2)
    assert 0 < threads._time(runner, 2) < 60
    assert runner.arena.used == 0
