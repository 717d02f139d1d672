"""Rows of prompts by what they take: services whose times are known, and machines that pause."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.coordinator.rounds.prompt_budget import (
    ALONE,
    GROWTH,
    LEAST_ROWS,
    SAMPLES,
    START_ROWS,
    PromptBudget,
)


def taken(budget: PromptBudget, row: float, fixed: float, rounds: int, delays: bool) -> list[int]:
    """The rows of so many rounds at a service that takes ``fixed + rows * row`` seconds."""
    rows = []
    for _ in range(rounds):
        rows.append(budget.rows(delays=delays))
        budget.observe(rows[-1], fixed + rows[-1] * row)
    return rows


@pytest.mark.parametrize("fixed", [0.0, 0.004, 0.05])
@pytest.mark.parametrize("row", [1e-5, 1e-4, 3e-3])
def test_prompt_budget_finds_the_rows_that_take_the_set_time(row: float, fixed: float) -> None:
    budget = PromptBudget(0.1, 100_000)
    for _ in range(3):
        budget.observe(0, fixed)
    right = 0.1 / row
    beside = taken(budget, row, fixed, 12, delays=True)[-1]
    assert beside == pytest.approx(right, rel=0.05)
    alone = taken(budget, row, fixed, 12, delays=False)[-1]
    assert alone == pytest.approx(min(ALONE * right, 100_000), rel=0.05)


def test_prompt_budget_where_nothing_ran_without_prompts_errs_on_the_short_side() -> None:
    """The fixed time then counts as that of the rows: less and less, the more there are."""
    budget = PromptBudget(0.1, 100_000)
    rows = taken(budget, 1e-4, 0.02, 20, delays=True)
    assert all(0.02 + count * 1e-4 <= 0.1 * 1.01 for count in rows)
    assert rows[-1] == pytest.approx(800, rel=0.05)


def test_prompt_budget_goes_on_however_slow_the_service_is() -> None:
    budget = PromptBudget(0.1, 8192)
    assert budget.rows(delays=True) == START_ROWS
    assert taken(budget, 10.0, 0.0, 4, delays=True)[1:] == [LEAST_ROWS] * 3


@given(most=st.integers(1, 4096), row=st.floats(0, 1), delays=st.booleans())
def test_prompt_budget_is_at_least_a_row_and_at_most_what_is_allowed(
    most: int, row: float, delays: bool
) -> None:
    budget = PromptBudget(0.05, most)
    assert all(1 <= rows <= most for rows in taken(budget, row, 0.001, 20, delays))


def test_prompt_budget_tries_far_more_rows_step_by_step() -> None:
    """Where the rows seem to take no time at all beside the fixed one."""
    budget = PromptBudget(0.1, 1 << 20)
    budget.observe(0, 0.06)
    rows = taken(budget, 1e-8, 0.06, 4, delays=True)
    assert rows == [START_ROWS * GROWTH**i for i in range(4)]


def test_prompt_budget_knows_from_a_short_prompt_what_is_safe() -> None:
    budget = PromptBudget(0.1, 100_000)
    budget.observe(64, 0.002)
    assert budget.rows(delays=True) == 3200
    budget.observe(0, 0.002)
    budget.observe(64, 0.002)
    assert budget.rows(delays=True) == 3200


def test_prompt_budget_one_pause_of_the_machine_changes_nothing() -> None:
    budget = PromptBudget(0.1, 100_000)
    taken(budget, 1e-4, 0.01, SAMPLES, delays=True)
    before = budget.rows(delays=True)
    budget.observe(before, 5.0)
    assert budget.rows(delays=True) == pytest.approx(before, rel=0.1)
    budget.observe(0, 5.0)
    budget.observe(0, 0.01)
    assert budget.rows(delays=True) == pytest.approx(before, rel=0.2)


def test_prompt_budget_short_prompts_say_less_than_large_chunks() -> None:
    """A row or two cost as much as the weights take to read: no reason for small chunks."""
    budget = PromptBudget(0.1, 100_000)
    taken(budget, 1e-4, 0.02, SAMPLES, delays=True)
    before = budget.rows(delays=True)
    for _ in range(SAMPLES - 1):
        budget.observe(2, 0.02)
    assert budget.rows(delays=True) >= before / 2


def test_prompt_budget_follows_a_service_that_becomes_slower() -> None:
    """Rows far back in a long sequence cost more, for they read all that is before them."""
    budget = PromptBudget(0.1, 100_000)
    position, noise, late = 0, random.Random(1), []
    while position < 100_000:
        rows = budget.rows(delays=True)
        seconds = rows * (2e-5 + position * 1e-9) * noise.uniform(0.9, 1.1)
        budget.observe(rows, seconds)
        position += rows
        late.append(seconds)
    assert sum(late[3:]) / len(late[3:]) == pytest.approx(0.1, rel=0.2)
    assert max(late[3:]) < 0.2
