"""What is timed at start, in which order, and that nothing is left of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from outrider.draft_service.engine import DraftEngine
from outrider.shared.core.errors import OutriderError
from outrider.shared.core.types import CostPoint, OpenSequence, Refusal, RoundResult
from outrider.shared.kv.arena import Arena, PoolPlan
from outrider.shared.rounds.calibration import PROMPT, REPEATS, TrialPlan, calibrate, plan_for
from outrider.verify_service.engine import VerifyEngine
from outrider_testing import engines

VERIFY = (1, 5, 2, 9, 3, 7, 4)
PLAN = TrialPlan(((1, 1), (1, 5), (8, 1), (8, 5), (2, 1), (2, 2)), prompt=16, capacity=25)
Took = Callable[[int, int], float]
"""Seconds of a round of so many sequences and this amount; 0: a prompt is taken in."""


class FakeEngine:
    """An engine whose rounds take no time but that of its clock."""

    def __init__(
        self,
        took: Took,
        *,
        amounts: tuple[int, ...] = VERIFY,
        tokens: int = 1 << 16,
        places: int = 512,
        slow_calls: int = 1,
    ) -> None:
        self.now = 100.0
        self.captured = 0
        self.trial_amounts = amounts
        self.rounds: list[tuple[int, int]] = []
        """Sequences and amount of each."""
        self.open: set[int] = set()
        self.engine = self  # of its one session
        self.runner = SimpleNamespace(
            arena=Arena([PoolPlan(tokens)]),
            facts=SimpleNamespace(vocab_size=50),
            places=lambda length: places,
            slow_calls=slow_calls,
            between=self._between,
            time_device=lambda timed: None,
            device_seconds=lambda: None,
        )
        self._took = took

    def clock(self) -> float:
        return self.now

    def _between(self) -> bool:
        """One capture after the slow calls of each size."""
        done, self.captured = self.captured, len(set(self.rounds))
        return done < self.captured

    def connect(self) -> Any:
        session: Any = SimpleNamespace(
            engine=self, open=self._open, round=self._round, release=self.open.clear
        )
        return session

    def trial(self, opened: OpenSequence, base_len: int, tokens: Sequence[int], amount: int) -> Any:
        assert all(0 <= token < 50 for token in tokens)
        assert base_len + (amount or len(tokens)) <= opened.capacity
        assert len(tokens) >= amount
        return SimpleNamespace(sequence=opened.sequence_id, amount=amount)

    def trial_alone(self, session: Any, items: Sequence[Any]) -> float | None:
        return None

    def _open(self, request: OpenSequence) -> None:
        self.open.add(request.sequence_id)

    def _round(self, items: Sequence[Any]) -> RoundResult[Any]:
        assert {item.sequence for item in items} <= self.open
        (amount,) = {item.amount for item in items}
        self.rounds.append((len(items), amount))
        self.now += self._took(len(items), amount)
        return RoundResult()


def fake(took: Took, **changes: Any) -> Any:
    return FakeEngine(took, **changes)


def timed(engine: Any, plan: TrialPlan, seconds: float = 2.0) -> list[CostPoint]:
    return calibrate(engine, plan, seconds, engine.clock)


def table(points: Sequence[CostPoint]) -> dict[tuple[int, int], float]:
    return {(one.sequences, one.amount): one.seconds for one in points}


def test_plan_begins_with_what_tells_most() -> None:
    sizes = plan_for(fake(lambda count, amount: 0.0)).sizes
    assert sizes[:6] == ((1, 1), (1, 5), (8, 1), (8, 5), (32, 1), (32, 5))
    assert len(set(sizes)) == len(sizes)
    # Fine where there are few sequences, coarse where there are many.
    amounts = {count: {a for n, a in sizes if n == count} for count, _ in sizes}
    assert amounts == {n: {1, 2, 3, 4, 5, 7, 9} for n in (1, 2, 4, 8)} | {
        n: {1, 2, 3, 4, 5} for n in (16, 32, 64)
    }


@pytest.mark.parametrize("tokens", [24, 25, 25 * 8 + 24, 25 * 64])
def test_plan_has_no_more_sequences_than_the_arena_holds(tokens: int) -> None:
    made = plan_for(fake(lambda count, amount: 0.0, tokens=tokens))
    most = max((count for count, _ in made.sizes), default=0)
    assert made.capacity == PROMPT + 9
    assert most == {24: 0, 25: 1, 224: 8, 1600: 64}[tokens]


@pytest.mark.parametrize(("places", "prompt"), [(9, 0), (10, 1), (20, 11), (25, 16), (4096, 16)])
def test_plan_stays_within_a_short_context(places: int, prompt: int) -> None:
    made = plan_for(fake(lambda count, amount: 0.0, places=places))
    assert (made.prompt, bool(made.sizes)) == (prompt, prompt > 0)
    assert made.capacity <= places


def test_plan_of_an_engine_without_proposals_is_empty() -> None:
    engine = DraftEngine(engines.runner(engines.tiny_llama()), 0)
    assert plan_for(engine).sizes == ()
    verify = VerifyEngine(engines.runner(engines.tiny_llama()), 0)
    assert {amount for _, amount in plan_for(verify).sizes} == {1}


def test_calibrate_takes_the_median_and_leaves_slow_calls_out() -> None:
    seen: list[tuple[int, int]] = []

    def took(count: int, amount: int) -> float:
        seen.append((count, amount))
        calls = seen.count((count, amount))
        # Two that compile and capture, then rounds of which one was disturbed.
        return 1e-3 * (40 if calls <= 2 else 30 if calls == 4 else 10 * count * amount)

    engine = fake(took, slow_calls=2)
    points = timed(engine, TrialPlan(((1, 1), (2, 1)), 16, 25), seconds=60.0)
    assert table(points) == pytest.approx({(1, 1): 0.010, (2, 1): 0.020})
    assert engine.rounds.count((1, 1)) == 2 + REPEATS


def test_calibrate_spends_no_time_on_what_is_compiled() -> None:
    """Every first call compiles for half a second: all sizes are timed all the same."""
    seen: set[tuple[int, int]] = set()

    def took(count: int, amount: int) -> float:
        first = amount > 0 and (count, amount) not in seen
        seen.add((count, amount))
        return 0.5 if first else 1e-3

    sizes = ((1, 1), (1, 5), (8, 1), (8, 5), (32, 1), (32, 5))
    points = timed(fake(took, slow_calls=2), TrialPlan(sizes, 16, 25), seconds=2.0)
    assert set(table(points)) == set(sizes)
    assert list(table(points).values()) == pytest.approx([1e-3] * len(sizes))


def test_calibrate_times_slow_rounds_less_often() -> None:
    repeats = {}
    for seconds in (0.001, 0.015, 0.030, 0.100):
        engine = fake(lambda count, amount, seconds=seconds: seconds * (amount > 0))
        timed(engine, TrialPlan(((1, 1),), 16, 25))
        repeats[seconds] = engine.rounds.count((1, 1)) - 1
    assert repeats == {0.001: 5, 0.015: 3, 0.030: 2, 0.100: 1}


@pytest.mark.parametrize("cost", [1e-4, 3e-3, 0.02, 0.1, 0.3, 5.0])
def test_calibrate_ends_in_time_with_what_tells_most(cost: float) -> None:
    def took(count: int, amount: int) -> float:
        return cost * (1 + 0.02 * count * max(amount, 1))

    engine = fake(took)
    whole = plan_for(engine)
    began = engine.now
    points = timed(engine, whole)
    # The first size is timed, come what may: its prompt, a slow call, and one round.
    assert engine.now - began <= max(2.0, 3 * took(1, 1)) * 1.0001
    sizes = list(table(points))
    assert sizes[0] == (1, 1)
    assert sizes == [size for size in whole.sizes if size in sizes]
    assert len(sizes) == len(whole.sizes) or cost > 1e-3
    if cost <= 0.02:
        assert sizes[:3] == [(1, 1), (1, 5), (8, 1)]
    assert all(one.seconds == pytest.approx(took(one.sequences, one.amount)) for one in points)
    assert not engine.open


def test_calibrate_begins_no_round_that_would_end_too_late() -> None:
    for tenths in range(2, 400, 3):
        engine = fake(lambda count, amount, cost=tenths * 1e-4: cost * (1 + 0.01 * count * amount))
        began = engine.now
        timed(engine, plan_for(engine))
        assert engine.now - began <= 2.0 + 1e-9


def test_calibrate_goes_on_with_what_is_small_where_something_large_has_no_time() -> None:
    engine = fake(lambda count, amount: 0.1 if count == 1 else 0.6 * count / 8)
    assert list(table(timed(engine, PLAN, seconds=2.4))) == [(1, 1), (1, 5), (2, 1), (2, 2)]


def test_calibrate_tells_of_no_size_whose_growth_is_not_known() -> None:
    engine = fake(lambda count, amount: count * (0.05 * amount if amount else 0.01))
    # There is time for (8, 1) and (2, 1), and not for (8, 5) and (2, 2).
    assert list(table(timed(engine, PLAN))) == [(1, 1), (1, 5)]
    assert {(8, 1), (2, 1)} < set(engine.rounds)
    alone = fake(lambda count, amount: 1e-3, amounts=(1,))
    assert list(table(timed(alone, TrialPlan(((1, 1), (8, 1)), 16, 25)))) == [(1, 1), (8, 1)]


def test_calibrate_keeps_prompts_short_where_they_take_long() -> None:
    one = TrialPlan(((1, 1),), prompt=16, capacity=25)
    fast, slow = fake(lambda count, amount: 1e-3), fake(lambda count, amount: 0.11)
    timed(fast, one)
    timed(slow, one)
    # Pieces of 1, 1, 2, 4 and 7 rows; and one row, after which a twentieth of the time was over.
    assert (fast.rounds.count((1, 0)), slow.rounds.count((1, 0))) == (5, 1)


def test_calibrate_a_smaller_round_takes_no_longer_than_a_larger_one() -> None:
    def took(count: int, amount: int) -> float:
        return 0.030 if (count, amount) == (2, 2) else 1e-3 * count * max(amount, 1)

    points = timed(fake(took), PLAN, seconds=30.0)
    # Something held each of its rounds up; nothing larger than (8, 5) tells of (8, 5).
    assert table(points) == pytest.approx(
        {(1, 1): 0.001, (1, 5): 0.005, (8, 1): 0.008, (8, 5): 0.040, (2, 1): 0.002, (2, 2): 0.030}
    )
    points = timed(fake(lambda n, a: took(n, a) if n < 8 else 0.002 * a), PLAN, seconds=30.0)
    assert table(points)[2, 2] == pytest.approx(0.010)


def test_calibrate_is_refused_and_leaves_nothing_open() -> None:
    engine = fake(lambda count, amount: 1e-3)
    session = engine.connect()
    refusal = Refusal(0, 1, 6, "the model's logits are not finite")
    session.round = lambda items: RoundResult([], [refusal] * (items[0].amount == 5))
    engine.connect = lambda: session  # type: ignore[method-assign]
    with pytest.raises(OutriderError, match="not finite"):
        timed(engine, PLAN)
    assert not engine.open


@pytest.mark.parametrize("kind", ["llama", "gpt2", "kernels"])
@pytest.mark.parametrize("role", ["verify", "draft"])
def test_calibrate_leaves_engine_and_tokens_as_they_were(role: str, kind: str) -> None:
    def pair() -> tuple[VerifyEngine, DraftEngine]:
        model = engines.tiny_gpt2(3) if kind == "gpt2" else engines.tiny_llama(3)
        options: dict[str, Any] = {"runner": "auto" if kind == "kernels" else "generic"}
        return (
            VerifyEngine(engines.runner(model, **options), 8),
            DraftEngine(engines.runner(engines.tiny_llama(4, layers=1), **options), 8),
        )

    prompts = engines.prompts(3, seed=5)
    wanted = [course.written for course in engines.speculate(*pair(), prompts, 12, 3)]
    verify, draft = pair()
    engine: Any = verify if role == "verify" else draft
    before, free = engine.info(), engine.runner.arena.allocators[0].largest_free
    whole = plan_for(engine)
    few = tuple(size for size in whole.sizes if max(size) < 9)
    # By a clock that stands still there is time for all of them.
    points = calibrate(engine, dataclasses.replace(whole, sizes=few), clock=lambda: 0.0)
    assert set(table(points)) == set(few)
    assert engine.info() == before
    assert engine.runner.arena.allocators[0].largest_free == free == before.arena_tokens
    found = [course.written for course in engines.speculate(verify, draft, prompts, 12, 3)]
    assert found == wanted


def test_calibrate_takes_the_engines_word_for_rounds_that_run_by_themselves() -> None:
    class Alone(FakeEngine):
        def trial_alone(self, session: Any, items: Sequence[Any]) -> float | None:
            self.now += 0.004
            return 0.003 if items[0].amount == 1 else None

    engine: Any = Alone(lambda count, amount: 0.01 * amount)
    made = table(timed(engine, plan_for(engine)))
    assert {made[count, 1] for count in (1, 8, 64)} == {0.003}
    assert made[8, 5] == pytest.approx(0.05)
    assert (8, 1) not in engine.rounds
