"""Who runs: first come, first served; prompts in chunks; bounded waiting."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from outrider.coordinator.rounds.scheduler import Scheduler
from outrider.shared.core.errors import CapacityError


@dataclass(eq=False)
class One:
    missing: int = 1
    name: str = ""
    ready: bool = True
    shares: bool = False


def make(**options: int) -> Scheduler[One]:
    return Scheduler[One](**({"max_running": 4, "max_waiting": 8, "prefill_chunk": 100} | options))


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


def test_scheduler_prompts_share_one_chunk_oldest_first() -> None:
    scheduler = make()
    running, long, short = One(1), One(250), One(30)
    scheduler.submit([running, long, short])
    plan = scheduler.plan()
    assert plan.decode == [running]
    assert plan.prefill == [(long, 100)]
    long.missing = 50
    assert scheduler.plan().prefill == [(long, 50), (short, 30)]


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
        self.scheduler = make(max_running=3, max_waiting=4, prefill_chunk=64)
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
