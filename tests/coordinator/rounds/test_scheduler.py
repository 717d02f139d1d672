"""Who runs: first come, first served; prompts share a budget of rows; bounded waiting."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from outrider.coordinator.rounds.scheduler import Scheduler, share_out
from outrider.shared.core.errors import CapacityError


@dataclass(eq=False)
class One:
    missing: int = 1
    name: str = ""
    ready: bool = True
    shares: bool = False


@dataclass
class Rows:
    """A budget that is set; ``asked``: whether the last question was for a round of decoding."""

    beside: int = 100
    alone: int = 100
    asked: bool | None = None

    def rows(self, *, delays: bool) -> int:
        self.asked = delays
        return self.beside if delays else self.alone


def make(budget: Rows | None = None, **options: int) -> Scheduler[One]:
    sizes = {"max_running": 4, "max_waiting": 8} | options
    return Scheduler[One](budget=budget or Rows(), **sizes)


def test_scheduler_admits_in_order_up_to_its_limit() -> None:
    scheduler = make(max_running=2)
    ones = [One(name=str(i)) for i in range(4)]
    scheduler.submit(ones)
    assert scheduler.plan().decode == ones[:2]
    assert scheduler.waiting == 2
    scheduler.remove(ones[0])
    assert scheduler.plan().decode == [ones[1], ones[2]]


def test_scheduler_refuses_beyond_its_queue_with_sizes() -> None:
    scheduler = make(max_running=1, max_waiting=2)
    scheduler.submit([One()])
    scheduler.plan()
    scheduler.submit([One(), One()])
    with pytest.raises(CapacityError, match=r"1 sequences are running .*2 wait \(at most 2\)") as e:
        scheduler.submit([One()])
    assert not e.value.permanent
    assert scheduler.waiting == 2


def test_scheduler_prompts_run_beside_those_that_decode() -> None:
    budget = Rows(beside=100, alone=1000)
    scheduler = make(budget)
    running, long, short = One(1), One(250), One(30)
    scheduler.submit([running, long, short])
    plan = scheduler.plan()
    assert plan.decode == [running]
    # The short one has what it lacks out of the half that is for those near their end.
    assert plan.prefill == [(long, 70), (short, 30)]
    assert budget.asked
    scheduler.remove(running)
    assert scheduler.plan().prefill == [(long, 250), (short, 30)]
    assert not budget.asked


def test_scheduler_many_prompts_go_in_one_round() -> None:
    scheduler = make(Rows(alone=2048), max_running=64, max_waiting=64)
    prompts = [One(64) for _ in range(32)]
    scheduler.submit(prompts)
    assert scheduler.plan().prefill == [(one, 64) for one in prompts]


def test_scheduler_a_prompt_that_is_shared_keeps_its_last_token() -> None:
    scheduler = make()
    scheduler.submit([One(40, shares=True)])
    assert [rows for _, rows in scheduler.plan().prefill] == [39]


wants = st.lists(st.integers(1, 2000), min_size=1, max_size=12)


@given(wanted=wants, budget=st.integers(1, 3000))
def test_share_out_keeps_the_budget_and_leaves_none_of_it(wanted: list[int], budget: int) -> None:
    given_ = share_out(wanted, budget)
    assert sum(given_) == min(budget, sum(wanted))
    assert all(0 <= rows <= most for rows, most in zip(given_, wanted, strict=True))
    # The oldest goes on at half the speed at least, and whoever lacks least, too.
    assert given_[0] >= min(wanted[0], budget - budget // 2)
    least = min(range(len(wanted)), key=lambda i: wanted[i])
    assert given_[least] >= min(wanted[least], budget // 2)


@given(
    arrivals=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 500)), min_size=1, max_size=8),
    beside=st.integers(1, 64),
    alone=st.integers(1, 256),
)
def test_scheduler_takes_every_row_of_every_prompt_once_and_in_order(
    arrivals: list[tuple[int, int]], beside: int, alone: int
) -> None:
    """Prompts arrive in some rounds; whoever was taken in decodes for a while."""
    scheduler = make(Rows(beside, alone), max_running=3, max_waiting=64)
    todo = sorted(arrivals)
    lacked = {str(i): size for i, (_, size) in enumerate(todo)}
    taken = dict.fromkeys(lacked, 0)
    decoded = dict.fromkeys(lacked, 0)
    arrived = 0
    for number in range(sum(lacked.values()) + 100):
        while arrived < len(todo) and todo[arrived][0] <= number:
            scheduler.submit([One(todo[arrived][1], str(arrived))])
            arrived += 1
        plan = scheduler.plan()
        rows = sum(count for _, count in plan.prefill)
        assert rows <= (beside if plan.decode else alone)
        # While there is a prompt every round takes some of it in, and of the oldest for certain.
        prompts = [one for one in scheduler.running if one.missing > 1]
        assert (rows > 0) == bool(prompts)
        assert not prompts or plan.prefill[0][0] is prompts[0]
        # Whoever has but one row to go runs in every round.
        assert plan.decode == [one for one in scheduler.running if one.missing == 1]
        for one, count in plan.prefill:
            assert 0 < count <= one.missing
            taken[one.name] += count
            one.missing = max(1, one.missing - count)
        for one in plan.decode:
            taken[one.name] += taken[one.name] < lacked[one.name]  # the last row of its prompt
            decoded[one.name] += 1
            if decoded[one.name] == 4:
                scheduler.remove(one)
        if arrived == len(todo) and not (scheduler.running or scheduler.waiting):
            break
    assert decoded == dict.fromkeys(lacked, 4), "somebody starved"
    assert taken == lacked


def test_scheduler_nobody_overtakes_a_refused_head() -> None:
    scheduler = make()
    small, large, later = One(), One(), One()
    scheduler.submit([small, large, later])
    scheduler.plan()
    scheduler.remove(later)
    scheduler.refuse(large)
    scheduler.submit([later])
    assert scheduler.full
    assert scheduler.plan().decode == [small]
    scheduler.remove(small)  # its room is free
    assert scheduler.plan().decode == [large, later]


def test_scheduler_a_refused_head_that_leaves_lets_the_next_one_try() -> None:
    scheduler = make()
    large, small = One(), One()
    scheduler.submit([large, small])
    scheduler.plan()
    scheduler.remove(small)
    scheduler.refuse(large)
    scheduler.submit([small])
    scheduler.remove(large)
    assert scheduler.plan().decode == [small]


class SchedulerMachine(RuleBasedStateMachine):
    """Random traffic against the rules that always hold."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make(Rows(64, 64), max_running=3, max_waiting=4)
        self.arrived: list[One] = []
        self.gone: set[int] = set()

    @rule(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=3))
    def submit(self, sizes: list[int]) -> None:
        new = [One(size) for size in sizes]
        before = self.scheduler.waiting
        free = 0 if self.scheduler.full else 3 - len(self.scheduler.running)
        room = 4 - before + free
        try:
            self.scheduler.submit(new)
        except CapacityError:
            assert len(new) > room
        else:
            assert len(new) <= room
            self.arrived.extend(new)

    @rule()
    def run(self) -> None:
        plan = self.scheduler.plan()
        rows = sum(rows for _, rows in plan.prefill)
        assert rows <= 64
        for one, count in plan.prefill:
            assert 1 <= count <= one.missing
            one.missing = max(1, one.missing - count)

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.scheduler.running))
        self.scheduler.remove(one)
        self.gone.add(id(one))

    @precondition(lambda self: self.scheduler.running)
    @rule()
    def refuse_newest(self) -> None:
        self.scheduler.refuse(self.scheduler.running[-1])

    @invariant()
    def order_is_kept(self) -> None:
        alive = [one for one in self.arrived if id(one) not in self.gone]
        running = self.scheduler.running
        assert len(running) <= 3
        assert running == alive[: len(running)]
        assert self.scheduler.waiting == len(alive) - len(running)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=80, deadline=None)
