"""What rounds take is timed once for an engine on a machine, and again where something differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from outrider.draft_service.engine import DraftEngine
from outrider.shared.core.errors import OutriderError
from outrider.shared.core.types import CostPoint
from outrider.shared.rounds import kept_costs
from outrider.shared.rounds.calibration import TrialPlan, plan_for
from outrider.shared.rounds.kept_costs import circumstances, costs_of
from outrider.verify_service.engine import VerifyEngine
from outrider_testing import engines

TABLE = [CostPoint(1, 1, 0.25), CostPoint(8, 5, 1.5)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The engines that were timed; in place of that, each is told to cost what ``TABLE`` says."""
    seen: list[Any] = []

    def calibrate(engine: Any, plan: Any, *seconds: float) -> list[CostPoint]:
        if not seconds:  # else what is kept is looked at
            seen.append(engine)
        return TABLE

    monkeypatch.setattr(kept_costs, "calibrate", calibrate)
    return seen


def verify(max_k: int = 8, **changes: Any) -> VerifyEngine:
    return VerifyEngine(engines.runner(engines.tiny_llama(**changes)), max_k)


def ask(engine: Any, kept: Path) -> tuple[list[CostPoint], list[str]]:
    said: list[str] = []
    return costs_of(engine, kept, said.append), said


def test_costs_are_timed_at_the_first_start_alone(tmp_path: Path, asked: list[Any]) -> None:
    assert ask(verify(), tmp_path) == (TABLE, ["calibrating"])
    assert ask(verify(), tmp_path) == (TABLE, [])
    assert len(asked) == 1


def test_costs_that_were_disturbed_when_they_were_timed_are_timed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale, calls = 2.0, []

    def calibrate(engine: Any, plan: TrialPlan, *seconds: float) -> list[CostPoint]:
        calls.append(plan.sizes)
        return [CostPoint(*size, scale * 1e-3 * size[0] * size[1]) for size in plan.sizes]

    monkeypatch.setattr(kept_costs, "calibrate", calibrate)
    engine = verify()
    disturbed, _ = ask(engine, tmp_path)
    scale = 1.0
    right, said = ask(engine, tmp_path)
    assert said == ["calibrating"]
    assert [one.seconds for one in right] == [one.seconds / 2 for one in disturbed]
    scale = 5.0  # something else runs now: no reason to hold it against the rounds
    calls.clear()
    assert ask(engine, tmp_path) == (right, [])
    assert calls == [tuple(size for size in plan_for(engine).sizes if size[0] == 1)]


def test_costs_are_of_one_kind_of_engine_and_model(tmp_path: Path, asked: list[Any]) -> None:
    made: list[Any] = [
        verify(),
        verify(max_k=4),
        verify(layers=3),
        verify(hidden=64),
        verify(vocab_size=98),
        verify(num_key_value_heads=4),
        VerifyEngine(engines.runner(engines.tiny_llama(), runner="llama"), 8),
        VerifyEngine(engines.runner(engines.tiny_llama(), arena_bytes=1 << 18), 8),
        DraftEngine(engines.runner(engines.tiny_llama()), 8),
    ]
    for engine in made:
        ask(engine, tmp_path)
    assert asked == made
    # Other weights take the same time.
    ask(VerifyEngine(engines.runner(engines.tiny_llama(seed=9)), 8), tmp_path)
    assert asked == made


@pytest.mark.parametrize(
    ("owner", "name", "other"),
    [
        ("kept_costs.metadata", "version", lambda name: "0.0.0"),
        ("kept_costs.torch", "__version__", "0.0"),
        ("kept_costs.torch", "get_num_threads", lambda: 99),
        ("kept_costs", "cores", lambda: 99),
        ("kept_costs", "_processor", lambda: "another"),
        ("kept_costs", "FORMAT", 0),
    ],
)
def test_costs_are_of_one_machine_and_version(
    tmp_path: Path,
    asked: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    owner: str,
    name: str,
    other: Any,
) -> None:
    engine = verify()
    ask(engine, tmp_path)
    with monkeypatch.context() as changed:
        changed.setattr(f"outrider.shared.rounds.{owner}.{name}", other)
        ask(engine, tmp_path)
        assert len(asked) == 2
    ask(engine, tmp_path)
    assert len(asked) == 2


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", '{"circumstances": 1}', "foreign", "short", [[1, 1]], [[1, 1, 0.0]],
     [[1, 1, -1.0]], [[0, 1, 0.5]], [[1, 1, float("nan")]], [["a", 1, 0.5]], 7],
)  # fmt: skip
def test_costs_that_are_no_table_are_replaced(
    tmp_path: Path, asked: list[Any], damage: Any
) -> None:
    engine = verify()
    ask(engine, tmp_path)
    (place,) = tmp_path.glob("costs-*.json")
    whole = json.loads(place.read_text())
    if damage == "foreign":
        whole["circumstances"]["device"] = "another"
        place.write_text(json.dumps(whole))
    elif damage == "short":
        place.write_text(place.read_text()[:-9])
    elif isinstance(damage, str):
        place.write_text(damage)
    else:
        place.write_text(json.dumps(whole | {"found": damage}))
    assert ask(engine, tmp_path) == (TABLE, ["calibrating"])
    assert ask(engine, tmp_path) == (TABLE, [])
    assert len(asked) == 2


def test_costs_cut_short_are_kept_and_failures_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(engine: Any, plan: Any) -> list[CostPoint]:
        raise OutriderError("a round of 8 sequences: out of memory")

    engine = verify()
    monkeypatch.setattr(kept_costs, "calibrate", broken)
    with pytest.raises(OutriderError, match="out of memory"):
        ask(engine, tmp_path)
    assert not list(tmp_path.glob("costs-*"))
    monkeypatch.setattr(kept_costs, "calibrate", lambda engine, plan: TABLE[:1])
    assert ask(engine, tmp_path)[0] == TABLE[:1]
    monkeypatch.setattr(kept_costs, "calibrate", broken)
    assert ask(engine, tmp_path)[0] == TABLE[:1]


def test_costs_need_no_folder(tmp_path: Path, asked: list[Any]) -> None:
    (tmp_path / "file").write_text("")
    assert ask(verify(), tmp_path / "file" / "below") == (TABLE, ["calibrating"])


def test_circumstances_name_no_model_and_no_arena() -> None:
    told = json.dumps(circumstances(verify()))
    assert "tiny" not in told
    assert circumstances(verify()) == circumstances(
        VerifyEngine(engines.runner(engines.tiny_llama(), arena_bytes=2 << 20, path="other"), 8)
    )
