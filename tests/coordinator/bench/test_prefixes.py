"""What the study of second turns makes of its runs."""

from __future__ import annotations

import pytest

from outrider.coordinator.bench import prefixes
from outrider.coordinator.bench.prefixes import ALONE, ANEW, SECOND, Answered


def runs(other: tuple[int, ...] = (1, 2)) -> dict[str, list[Answered]]:
    return {
        SECOND: [Answered((1, 2), 0.02, 900), Answered((3, 4), 0.03, 899)],
        ANEW: [Answered(other, 0.2, 0), Answered((3, 4), 0.1, 0)],
        ALONE: [Answered((9, 9), 0.01, 0), Answered((8, 8), 0.03, 0)],
    }


def test_figures_are_medians_of_ratios_within_a_repeat() -> None:
    made = prefixes.figures_of(16, runs())
    assert made["against_alone"] == pytest.approx((2 + 1) / 2)
    assert made["against_anew"] == pytest.approx((0.1 + 0.3) / 2)
    assert made["first_token_seconds"][ALONE] == pytest.approx(0.02)
    assert (made["new"], made["cached"], made["same_tokens"]) == (16, 899, True)


def test_table_tells_where_tokens_differ() -> None:
    turns = [prefixes.figures_of(new, runs(other)) for new, other in ((1, (1, 2)), (64, (1, 7)))]
    rows = prefixes.table({"turns": turns}).splitlines()
    assert rows[2].endswith("|        899 |         yes |")
    assert rows[3].endswith("|        899 |          NO |")
    assert rows[3].startswith("| 64")
