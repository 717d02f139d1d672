"""A few cases of the battery; ``scripts/battery`` runs many."""

from __future__ import annotations

from pathlib import Path

import pytest

from outrider_testing.architectures import LENGTHS
from outrider_testing.battery.__main__ import main
from outrider_testing.battery.cases import DRAFTS, LINKS, draw_case
from outrider_testing.battery.stack import run_case
from outrider_testing.tokenizer_families import FAMILIES

SOME = (0, 1, 3, 4, 5, 6, 9, 13, 41, 64, 71)


@pytest.mark.parametrize("number", SOME)
def test_battery_finds_nothing(number: int, short_folder: Path) -> None:
    outcome = run_case(number, short_folder)
    assert outcome.faults == []
    assert outcome.judged
    assert not outcome.ties


def test_battery_tries_a_bit_of_everything_here() -> None:
    cases = [draw_case(number) for number in SOME]
    assert {case.family for case in cases} == set(FAMILIES)
    assert {case.link for case in cases} == set(LINKS)
    assert {case.draft for case in cases} == set(DRAFTS)
    assert {case.link for case in cases if case.draft == "wider"} == set(LINKS)
    assert any(case.architecture in LENGTHS for case in cases)


def test_battery_draws_the_same_case_again() -> None:
    assert [draw_case(number) for number in SOME] == [draw_case(number) for number in SOME]


def test_battery_tells_what_ran(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cases", "0"]) == 0
    assert '"cases": 0' in capsys.readouterr().out
