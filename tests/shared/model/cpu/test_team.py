"""The size of a team against simulated machines: whose costs are known, and change."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.shared.model.cpu.team import MOST_ROWS, Team

Cost = Callable[[int, int], float]


def spent(team: Team, cost: Cost, forwards: int, rows: Callable[[], int]) -> tuple[float, float]:
    """Seconds taken, and what the best size would have taken."""
    total = best = 0.0
    for _ in range(forwards):
        count = rows()
        size = team.next(count)
        took = cost(size, count)
        team.took(count, size, took)
        total += took
        best += min(cost(one, count) for one in team._sizes)
    return total, best


def quiet(size: int, rows: int) -> float:
    return 1e-3 * (1 + 0.1 * rows) / size**0.6


def busy(size: int, rows: int) -> float:
    """Another program has one core of two: the two wait for each other."""
    return 1e-3 * (1 + 0.1 * rows) * (6.0 if size > 1 else 1.0)


@given(seed=st.integers(0, 1000), largest=st.sampled_from([2, 3, 4, 8]))
@settings(max_examples=60, deadline=None)
def test_team_loses_little_on_a_quiet_machine(seed: int, largest: int) -> None:
    draw = random.Random(seed)
    team = Team(largest)

    def noisy(size: int, rows: int) -> float:
        return quiet(size, rows) * draw.uniform(1.0, 1.1)

    total, _ = spent(team, noisy, 4000, lambda: draw.choice([1, 4, 5]))
    best, _ = spent(team, noisy, 4000, lambda: draw.choice([1, 4, 5]))
    right = sum(quiet(largest, draw.choice([1, 4, 5])) * 1.05 for _ in range(4000))
    assert team.size == largest
    assert total < 1.03 * right
    assert best < 1.03 * right


@given(seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_team_gives_way_to_other_programs_and_comes_back(seed: int) -> None:
    draw = random.Random(seed)
    team = Team(2)

    def rows() -> int:
        return draw.choice([1, 4, 5])

    spent(team, quiet, draw.randrange(100, 3000), rows)
    total, best = spent(team, busy, 400, rows)
    assert team.size == 1
    assert total < 2 * best
    spent(team, quiet, 3000, rows)
    assert team.size == 2


def test_team_leaves_a_first_size_that_was_wrong() -> None:
    team = Team(8, 1)
    assert (team.usual, team.next(1)) == (1, 1)
    spent(team, quiet, 20_000, lambda: 1)
    assert team.size == 8


def test_team_wakes_no_thread_for_what_that_costs() -> None:
    team = Team(2, 1)
    spent(team, lambda size, rows: 2e-4 / size, 20_000, lambda: 1)
    assert team.size == 1


def test_team_is_not_moved_by_noise() -> None:
    """Draft, base and coordinator disturb each other: that alone is no reason to change."""
    draw, team, sizes = random.Random(0), Team(2), set()
    for _ in range(20_000):
        size = team.next(1)
        sizes.add((size, team.size))
        team.took(1, size, quiet(size, 1) * draw.choice([1.0, 1.2, 1.5, 1.9]))
    assert sizes == {(2, 2)}


def test_team_follows_a_context_that_grows() -> None:
    """Forwards that take longer and longer are no sign of others."""
    team, at = Team(2), iter(range(100_000))
    spent(team, lambda size, rows: quiet(size, rows) * (1 + next(at) / 3 / 4000), 4000, lambda: 1)
    assert team.size == 2


@pytest.mark.parametrize(("largest", "rows"), [(1, 1), (4, MOST_ROWS + 1)])
def test_team_does_not_try_where_there_is_nothing_to_learn(largest: int, rows: int) -> None:
    team = Team(largest)
    for _ in range(300):
        assert team.next(rows) == largest
        team.took(rows, largest, random.random())
