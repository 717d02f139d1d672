"""The arena's bookkeeping against plain lists: ownership, coalescing, rings, branches."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from outrider.shared.arena import Arena, Extent, PoolPlan
from outrider.shared.errors import CapacityError
from outrider.shared.slots import SlotAllocator

TOKENS, WINDOW, SLACK = 96, 8, 5
RING = WINDOW + SLACK


def test_slots_coalesce_whatever_the_order_of_frees() -> None:
    allocator = SlotAllocator(64)
    starts = [allocator.reserve(16) for _ in range(4)]
    assert sorted(starts) == [0, 16, 32, 48]
    for start in (16, 48, 32, 0):
        allocator.free(start)
    assert allocator.free_extents() == [(0, 64)]
    assert allocator.largest_free == 64


def test_slots_best_fit_takes_the_smallest_hole_that_fits() -> None:
    allocator = SlotAllocator(100)
    holes = [allocator.reserve(n) for n in (10, 1, 5, 1, 20, 1)]
    for start in (holes[0], holes[2], holes[4]):
        allocator.free(start)
    assert allocator.reserve(5) == holes[2]
    assert allocator.reserve(9) == holes[0]


def test_capacity_error_says_whether_waiting_helps_and_names_sizes() -> None:
    arena = Arena([PoolPlan(100)])
    arena.admit(60)
    with pytest.raises(CapacityError, match=r"60 token slots .* 40 of 100 .* 40") as now:
        arena.admit(60)
    assert not now.value.permanent
    with pytest.raises(CapacityError, match=r"101 token slots .* 100") as never:
        arena.admit(101)
    assert never.value.permanent


def test_admission_takes_a_place_in_every_pool_or_in_none() -> None:
    arena = Arena([PoolPlan(100), PoolPlan(RING, WINDOW, SLACK)])
    arena.admit(50)
    with pytest.raises(CapacityError):
        arena.admit(40)
    assert arena.allocators[0].used == 50
    assert arena.allocators[1].used == RING


def test_admit_and_free_stay_below_ten_microseconds_with_a_thousand_extents() -> None:
    allocator = SlotAllocator(1_000_000)
    live = [allocator.reserve(100 + (i * 37) % 400) for i in range(2000)]
    for start in live[::2]:
        allocator.free(start)
    assert allocator.live == 1000
    best = float("inf")
    for _ in range(30):
        began = time.perf_counter()
        for _ in range(50):
            allocator.free(allocator.reserve(260))
        best = min(best, (time.perf_counter() - began) / 100)
    assert best < 10e-6


def test_rollback_costs_the_same_for_any_number_of_tokens() -> None:
    arena = Arena([PoolPlan(10_000)])
    extent = arena.admit(10_000)
    times = []
    for rejected in (1, 9_000):
        best = float("inf")
        for _ in range(20):
            began = time.perf_counter()
            for _ in range(100):
                extent.advance(9_500)
                arena.rollback(extent, 9_500 - rejected)
            best = min(best, (time.perf_counter() - began) / 100)
        times.append(best)
    assert max(times) < 10e-6
    assert max(times) < 3 * min(times)


@pytest.mark.parametrize("start", [0, 3, WINDOW, 5 * RING - 2])
@pytest.mark.parametrize("rows", range(1, SLACK + 1))
def test_ring_holds_all_that_any_legal_rollback_reads(start: int, rows: int) -> None:
    """Positions are written one by one into a list of slots; what a reader needs must be the
    newest thing in its slot."""
    arena = Arena([PoolPlan(RING, WINDOW, SLACK)])
    extent = arena.admit(1000)
    slots: dict[int, int] = {}

    def write(first: int, end: int) -> None:
        for segment in arena.segments(extent, 0, first, end):
            for i in range(segment.count):
                slots[segment.slot + i] = segment.position + i
        extent.advance(end)

    while extent.valid_len < start:
        write(extent.valid_len, min(start, extent.valid_len + SLACK))
    write(start, start + rows)
    for back in range(start, start + rows + 1):
        extent.valid_len = start + rows
        assert arena.rollback(extent, back)
        assert arena.check_write(extent, back, 1) is None
        for segment in arena.segments(extent, 0, arena.first_read(0, back), back):
            for i in range(segment.count):
                assert slots[segment.slot + i] == segment.position + i
    # One more than a forward can have written is not held.
    extent.valid_len = start + rows
    if start > WINDOW:
        assert not arena.rollback(extent, start + rows - SLACK - 2)


def test_a_parent_outlives_its_free_until_its_last_branch_is_freed() -> None:
    arena = Arena([PoolPlan(100)])
    parent = arena.admit(40)
    parent.advance(30)
    one, two = arena.branch(parent, 30, 50), arena.branch(parent, 20, 30)
    assert arena.used == 40 + 20 + 10
    assert not arena.rollback(parent, 29)
    arena.free(parent)
    arena.free(one)
    assert arena.used == 40 + 10
    assert [s.position for s in arena.segments(two, 0, 0, 25)] == [0, 20]
    arena.free(two)
    assert arena.used == 0


class ArenaMachine(RuleBasedStateMachine):
    """The arena against a list of slots, each with (owner, position) or None."""

    extents = Bundle("extents")

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena([PoolPlan(TOKENS), PoolPlan(4 * RING, WINDOW, SLACK)])
        self.slots: list[list[tuple[int, int] | None]] = [
            [None] * pool.tokens for pool in self.arena.pools
        ]
        self.live: dict[int, Extent] = {}
        self.written: dict[int, int] = {}

    @rule(target=extents, capacity=st.integers(1, 40))
    def admit(self, capacity: int) -> Extent | None:
        try:
            extent = self.arena.admit(capacity)
        except CapacityError as error:
            free = [0] * len(self.arena.pools)
            runs = [0] * len(self.arena.pools)
            owned = self._owned()
            for pool, marks in enumerate(owned):
                for mark in marks:
                    runs[pool] = 0 if mark else runs[pool] + 1
                    free[pool] = max(free[pool], runs[pool])
            sizes = [pool.place_size(capacity) for pool in self.arena.pools]
            assert any(size > room for size, room in zip(sizes, free, strict=True))
            assert not error.permanent
            return None
        self.live[id(extent)] = extent
        self.written[id(extent)] = 0
        return extent

    @rule(extent=extents, rows=st.integers(1, SLACK))
    def extend(self, extent: Extent | None, rows: int) -> None:
        if extent is None or id(extent) not in self.live:
            return
        start = extent.valid_len
        if start + rows > extent.capacity:
            with pytest.raises(ValueError, match="capacity"):
                self.arena.check_write(extent, start, rows)
            return
        self.arena.check_write(extent, start, rows)
        for pool, marks in enumerate(self.slots):
            for segment in self.arena.segments(extent, pool, start, start + rows):
                for i in range(segment.count):
                    marks[segment.slot + i] = (id(extent), segment.position + i)
        extent.advance(start + rows)
        self.written[id(extent)] = max(self.written[id(extent)], start + rows)

    @rule(extent=extents, back=st.integers(0, 2 * SLACK))
    def rollback(self, extent: Extent | None, back: int) -> None:
        if extent is None or id(extent) not in self.live:
            return
        length = max(0, extent.valid_len - back)
        before = [list(marks) for marks in self.slots]
        held = length == 0 or all(
            self._intact(extent, pool, length) for pool in range(len(self.slots))
        )
        assert self.arena.rollback(extent, length) == held
        assert self.slots == before
        if held:
            assert extent.valid_len == length

    @rule(extent=consumes(extents))
    def free(self, extent: Extent | None) -> None:
        if extent is not None and self.live.pop(id(extent), None) is not None:
            self.arena.free(extent)
            self.arena.free(extent)

    def _intact(self, extent: Extent, pool: int, length: int) -> bool:
        first = self.arena.first_read(pool, length)
        return all(
            self.slots[pool][segment.slot + i] == (id(extent), segment.position + i)
            for segment in self.arena.segments(extent, pool, first, length)
            for i in range(segment.count)
        )

    def _owned(self) -> list[list[int]]:
        owned = [[0] * pool.tokens for pool in self.arena.pools]
        for extent in self.live.values():
            for marks, (start, size) in zip(owned, extent.places, strict=True):
                for slot in range(start, start + size):
                    marks[slot] += 1
        return owned

    @invariant()
    def no_slot_has_two_owners_and_none_is_lost(self) -> None:
        for marks, allocator in zip(self._owned(), self.arena.allocators, strict=True):
            assert max(marks) <= 1
            assert sum(marks) == allocator.used
            free = allocator.free_extents()
            assert sum(size for _, size in free) + allocator.used == allocator.tokens
            assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(free))
            assert allocator.largest_free == max((n for _, n in free), default=0)

    @invariant()
    def valid_positions_are_intact(self) -> None:
        for extent in self.live.values():
            for pool in range(len(self.slots)):
                assert self._intact(extent, pool, extent.valid_len)


TestArenaMachine = ArenaMachine.TestCase
TestArenaMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
