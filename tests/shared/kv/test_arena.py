"""The arena's bookkeeping against plain lists: ownership, coalescing, rings, branches."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from outrider.shared.core.errors import CapacityError
from outrider.shared.kv.arena import Arena, Extent, PoolPlan
from outrider.shared.kv.slots import SlotAllocator

TOKENS, WINDOW, SLACK = 96, 8, 5
RING = WINDOW + SLACK


def test_room_is_what_can_be_admitted() -> None:
    arena = Arena([PoolPlan(TOKENS), PoolPlan(5 * RING, WINDOW, SLACK)])
    for capacity in (1, 7, RING, 20, 48, TOKENS, TOKENS + 1):
        extents = []
        count = arena.room(capacity)
        for _ in range(count):
            extents.append(arena.admit(capacity))
        with pytest.raises(CapacityError):
            arena.admit(capacity)
        assert arena.room(capacity) == 0
        for extent in extents:
            arena.free(extent)


def test_slots_coalesce_whatever_the_order_of_frees() -> None:
    allocator = SlotAllocator(64)
    starts = [allocator.reserve(16) for _ in range(4)]
    assert sorted(starts) == [0, 16, 32, 48]
    for start in (16, 48, 32, 0):
        allocator.free(start)
    assert allocator.used == 0
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


@pytest.mark.serial
def test_admit_and_free_stay_below_ten_microseconds_with_a_thousand_extents() -> None:
    allocator = SlotAllocator(1_000_000)
    live = [allocator.reserve(100 + (i * 37) % 400) for i in range(2000)]
    for start in live[::2]:
        allocator.free(start)
    best = float("inf")
    for _ in range(30):
        began = time.perf_counter()
        for _ in range(50):
            allocator.free(allocator.reserve(260))
        best = min(best, (time.perf_counter() - began) / 100)
    assert best < 10e-6


@pytest.mark.serial
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


@pytest.mark.parametrize("written", [3, RING, RING + 4, 3 * RING])
@pytest.mark.parametrize("capacity", [RING - 2, 60])
def test_a_copy_can_be_rolled_back_to_whatever_is_there_and_no_further(
    written: int, capacity: int
) -> None:
    """Of a sequence in full attention and a ring, at every length, and every rollback of that."""
    arena = Arena([PoolPlan(200), PoolPlan(5 * RING, WINDOW, SLACK)])
    memory: list[list[int | None]] = [[None] * pool.tokens for pool in arena.pools]
    source = arena.admit(max(written + 1, 20))
    for position in range(written):
        for pool, slots in enumerate(memory):
            (segment,) = arena.segments(source, pool, position, position + 1)
            slots[segment.slot] = position
        source.advance(position + 1)
    taken = 0
    for length in range(1, min(written + 1, capacity)):
        copies = arena.copies(source, target := arena.admit(capacity), length)
        lost = written > RING and capacity < RING
        assert (copies is not None) == (arena.holds(source, length) and not lost)
        there = [list(slots) for slots in memory]
        for one in copies or ():
            there[one.pool][one.to : one.to + one.count] = there[one.pool][
                one.start : one.start + one.count
            ]
        if copies is not None:
            taken += 1
            arena.copied(source, target, length)
            for back in range(1, length + 1):
                target.valid_len = length
                if not arena.rollback(target, back):
                    continue
                for pool, slots in enumerate(there):
                    first = arena.first_read(pool, back)
                    found = arena.segments(target, pool, first, back)
                    held = [slots[one.slot + i] for one in found for i in range(one.count)]
                    assert held == list(range(first, back))
            assert arena.rollback(target, target.valid_len), "the last one may always be taken"
        arena.free(target)
    assert taken or written > RING > capacity
    arena.free(source)
    assert arena.used == 0


def test_trim_gives_back_the_rest_and_keeps_what_is_read() -> None:
    arena = Arena([PoolPlan(100), PoolPlan(4 * RING, WINDOW, SLACK)])
    short, long = arena.admit(50), arena.admit(50)
    short.advance(9)
    long.advance(9)
    long.advance(RING)
    long.advance(RING + 5)
    assert arena.trim(short, 7)
    assert (short.capacity, short.places[0][1], short.places[1][1]) == (7, 7, 7)
    assert arena.trim(long, RING + 2)
    assert (long.places[0][1], long.places[1][1]) == (RING + 2, RING)
    assert not arena.trim(long, 1), "what the ring has lost can't be kept"
    assert not arena.trim(short, 0)
    assert arena.used == 7 + RING + 2
    arena.free(short)
    arena.free(long)
    assert [one.used for one in arena.allocators] == [0, 0]


def test_trim_of_a_turned_ring_moves_no_position() -> None:
    """Positions lie where they do because of its size, which it keeps."""
    arena = Arena([PoolPlan(4 * RING, WINDOW, SLACK)])
    extent = arena.admit(50)
    extent.advance(RING)
    extent.advance(RING + 1)
    length = RING - 1
    first = arena.first_read(0, length)
    before = arena.segments(extent, 0, first, length)
    assert arena.trim(extent, length)
    assert arena.segments(extent, 0, first, length) == before
    assert arena.holds(extent, length)
    assert extent.places[0][1] == RING


def test_slots_shrink_at_their_end_and_coalesce() -> None:
    allocator = SlotAllocator(64)
    first, second = allocator.reserve(32), allocator.reserve(32)
    allocator.shrink(first, 10)
    assert (allocator.used, allocator.largest_free) == (42, 22)
    assert allocator.reserve(22) == first + 10
    allocator.shrink(second, 32)
    for wrong in (0, 33):
        with pytest.raises(ValueError, match=f"got {wrong}"):
            allocator.shrink(second, wrong)
    assert allocator.used == 64


def test_slots_tell_what_would_fit_without_some() -> None:
    allocator = SlotAllocator(40)
    starts = [allocator.reserve(10) for _ in range(4)]
    assert not allocator.fits_without(1, ())
    assert allocator.fits_without(10, [starts[1]])
    assert not allocator.fits_without(11, [starts[1], starts[3]])
    assert allocator.fits_without(30, [starts[3], starts[1], starts[2]])
    assert allocator.used == 40


class ArenaMachine(RuleBasedStateMachine):
    """The arena against lists of slots, each with (owner, position) or None.

    A forward that would break a rule is tried and must be refused; every other one is written
    to the lists, and what the arena says is valid must be found there.
    """

    extents = Bundle("extents")

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena([PoolPlan(TOKENS), PoolPlan(4 * RING, WINDOW, SLACK)])
        self.slots: list[list[tuple[Extent, int] | None]] = [
            [None] * pool.tokens for pool in self.arena.pools
        ]
        self.live: list[Extent] = []
        self.held_by_branches: list[Extent] = []

    @rule(target=extents, capacity=st.integers(1, 40))
    def admit(self, capacity: int) -> Extent | None:
        return self._reserve(capacity, lambda: self.arena.admit(capacity))

    @rule(target=extents, parent=extents, more=st.integers(1, 20), back=st.integers(0, SLACK))
    def branch(self, parent: Extent | None, more: int, back: int) -> Extent | None:
        if parent is None or parent not in self.live:
            return None
        prefix = parent.valid_len - back
        legal = (
            parent.parent is None
            and prefix > 0
            and all(self._intact(parent, pool, prefix) for pool in range(2))
        )
        if not legal:
            with pytest.raises(ValueError, match=r"branch|prefix_len"):
                self.arena.branch(parent, prefix, prefix + more)
            return None
        return self._reserve(more, lambda: self.arena.branch(parent, prefix, prefix + more))

    @rule(extent=extents, rows=st.integers(1, SLACK + 1))
    def extend(self, extent: Extent | None, rows: int) -> None:
        if extent is None or extent not in self.live:
            return
        start = extent.valid_len
        if start + rows > extent.capacity or rows > SLACK or extent.branches:
            with pytest.raises(ValueError, match=r"capacity|rings"):
                self.arena.check_write(extent, start, rows)
            return
        self.arena.check_write(extent, start, rows)
        for pool, marks in enumerate(self.slots):
            for segment in self.arena.segments(extent, pool, start, start + rows):
                for i in range(segment.count):
                    marks[segment.slot + i] = (extent, segment.position + i)
        extent.advance(start + rows)

    @rule(extent=extents, back=st.integers(0, 2 * SLACK))
    def rollback(self, extent: Extent | None, back: int) -> None:
        if extent is None or extent not in self.live:
            return
        length = max(extent.prefix_len, extent.valid_len - back)
        before = [list(marks) for marks in self.slots]
        pinned = any(b.parent is extent and b.prefix_len > length for b in self.live)
        held = not pinned and all(self._intact(extent, pool, length) for pool in range(2))
        was = extent.valid_len
        assert self.arena.rollback(extent, length) == held
        assert self.slots == before
        assert extent.valid_len == (length if held else was)

    @rule(extent=consumes(extents))
    def free(self, extent: Extent | None) -> None:
        if extent is None or extent not in self.live:
            return
        self.live.remove(extent)
        if extent.branches:
            self.held_by_branches.append(extent)
        self.arena.free(extent)
        self.arena.free(extent)

    def _reserve(self, size: int, reserve: Callable[[], Extent]) -> Extent | None:
        """Admission succeeds exactly where every pool has a run of free slots that is long
        enough."""
        fits = True
        for pool, marks in zip(self.arena.pools, self._owned(), strict=True):
            runs = [len(list(run)) for owned, run in itertools.groupby(marks) if owned == 0]
            fits = fits and max(runs, default=0) >= pool.place_size(size)
        if not fits:
            with pytest.raises(CapacityError) as error:
                reserve()
            assert not error.value.permanent
            return None
        extent = reserve()
        self.live.append(extent)
        return extent

    def _intact(self, extent: Extent, pool: int, length: int) -> bool:
        def owner(position: int) -> Extent:
            return extent if position >= extent.prefix_len else extent.parent or extent

        first = self.arena.first_read(pool, length)
        return all(
            self.slots[pool][segment.slot + i]
            == (owner(segment.position + i), segment.position + i)
            for segment in self.arena.segments(extent, pool, first, length)
            for i in range(segment.count)
        )

    def _owned(self) -> list[list[int]]:
        """How many extents own each slot."""
        self.held_by_branches = [e for e in self.held_by_branches if e.branches]
        owned = [[0] * pool.tokens for pool in self.arena.pools]
        for extent in self.live + self.held_by_branches:
            for marks, (start, size) in zip(owned, extent.places, strict=True):
                for slot in range(start, start + size):
                    marks[slot] += 1
        return owned

    @invariant()
    def no_slot_has_two_owners_and_none_is_lost(self) -> None:
        for marks, allocator in zip(self._owned(), self.arena.allocators, strict=True):
            assert max(marks) <= 1
            assert sum(marks) == allocator.used
            free = sorted(allocator._size_at.items())
            assert sum(size for _, size in free) + allocator.used == allocator.tokens
            assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(free))
            assert allocator.largest_free == max((n for _, n in free), default=0)

    @invariant()
    def valid_positions_are_intact(self) -> None:
        for extent in self.live:
            for pool in range(len(self.slots)):
                assert self._intact(extent, pool, extent.valid_len)


TestArenaMachine = ArenaMachine.TestCase
TestArenaMachine.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
