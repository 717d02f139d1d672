"""The arena against a plain model: memory is a list, every write leaves a stamp of its own.

The model knows nothing of valid lengths, rings or free lists. It remembers for each sequence the
stamps of its positions, and looks into the memory whether they are where the arena says.
"""

from __future__ import annotations

import itertools
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from outrider.shared.core.errors import CapacityError
from outrider.shared.kv.arena import Arena, Extent, PoolPlan
from outrider.shared.kv.slots import SlotAllocator

WINDOW, SLACK = 5, 4  # slack = K_max + 1 = rows of one forward
FULL_TOKENS, RING_TOKENS = 64, 50


@dataclass(eq=False)
class Live:
    """One sequence: its extent, and the stamps of its valid positions."""

    extent: Extent
    stamps: list[int] = field(default_factory=list)
    """By position; what lies behind the valid length is cut off."""
    parent: Live | None = None
    branches: list[Live] = field(default_factory=list)
    gone: bool = False

    def children(self) -> list[Live]:
        """Branches that live."""
        return [branch for branch in self.branches if not branch.gone]

    def floor(self) -> int:
        """Positions below are shared, with the parent or with branches."""
        own = 0 if self.parent is None else self.extent.prefix_len
        return max([own, *(branch.extent.prefix_len for branch in self.children())])


class ArenaMachine(RuleBasedStateMachine):
    """admit, extend, rollback, ring advance, branch, free, exhaustion."""

    sequences: Bundle[Live] = Bundle("sequences")
    pools = (PoolPlan(FULL_TOKENS), PoolPlan(RING_TOKENS, window=WINDOW, slack=SLACK))

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(self.pools)
        self.memory = [[0] * pool.tokens for pool in self.pools]
        self.stamp = itertools.count(1)
        self.known: list[Live] = []

    # --- operations ---------------------------------------------------------------------------

    @rule(target=sequences, capacity=st.integers(1, 30))
    def admit(self, capacity: int) -> Live | MultipleResults[Live]:
        sizes = self.sizes(capacity)
        fits = all(size <= self.largest_gap(pool) for pool, size in enumerate(sizes))
        before = self.places()
        try:
            extent = self.arena.admit(capacity)
        except CapacityError as error:
            assert not fits and not error.permanent
            assert self.places() == before, "a refused admission left something reserved"
            return multiple()
        assert fits
        assert [size for _, size in extent.places] == sizes
        return self.remember(Live(extent))

    @rule(capacity=st.integers(FULL_TOKENS + 1, 3 * FULL_TOKENS))
    def admit_what_never_fits(self, capacity: int) -> None:
        with pytest.raises(CapacityError, match=f"{capacity} .* {FULL_TOKENS}") as caught:
            self.arena.admit(capacity)
        assert caught.value.permanent

    @rule(live=sequences, rows=st.integers(1, SLACK))
    def extend(self, live: Live, rows: int) -> None:
        start, extent = len(live.stamps), live.extent
        frozen = bool(live.children()) and len(self.pools) > 1  # rings under live branches
        allowed = not live.gone and not frozen and start + rows <= extent.capacity
        if not allowed:
            with pytest.raises(ValueError):
                self.arena.check_write(extent, start, rows)
            return
        self.arena.check_write(extent, start, rows)
        new = [next(self.stamp) for _ in range(rows)]
        for pool, memory in enumerate(self.memory):
            for part in self.arena.segments(extent, pool, start, start + rows):
                first = part.position - start
                memory[part.slot : part.slot + part.count] = new[first : first + part.count]
        extent.advance(start + rows)
        live.stamps += new

    @rule(live=sequences, rows=st.integers(1, SLACK), accepted=st.integers(0, SLACK))
    def verify(self, live: Live, rows: int, accepted: int) -> None:
        # A legal round: a forward, then a rollback to anywhere behind its first row.
        before = len(live.stamps)
        self.extend(live, rows)
        if len(live.stamps) == before + rows:
            kept = max(before + min(accepted, rows), live.floor())
            assert self.arena.rollback(live.extent, kept), "a legal rollback was refused"
            del live.stamps[kept:]

    @rule(live=sequences, back=st.integers(-2, 2 * SLACK))
    def rollback(self, live: Live, back: int) -> None:
        if live.gone:
            return
        length = max(0, len(live.stamps) - back)
        extent, before = live.extent, [list(part) for part in self.memory]
        was = extent.valid_len
        done = self.arena.rollback(extent, length)
        assert self.memory == before, "a rollback moved or cleared KV"
        if done:
            assert live.floor() <= length <= was
            assert extent.valid_len == length
            del live.stamps[length:]  # `reads` looks whether what is needed is there
        else:
            assert extent.valid_len == was
            # What a branch that is gone has pinned may stay so while another lives.
            lowest = max(live.floor(), extent.pinned)
            legal = lowest <= length <= was and extent.high - length <= SLACK
            assert not legal, "a rollback within the slack was refused"

    @rule(target=sequences, live=sequences, prefix=st.integers(1, 24), more=st.integers(1, 8))
    def branch(self, live: Live, prefix: int, more: int) -> Live | MultipleResults[Live]:
        prefix = min(prefix, len(live.stamps))
        if live.gone or live.parent is not None or prefix == 0:
            with pytest.raises(ValueError):
                self.arena.branch(live.extent, prefix, prefix + more)
            return multiple()
        sizes = self.sizes(more)
        fits = all(size <= self.largest_gap(pool) for pool, size in enumerate(sizes))
        held = self.arena.holds(live.extent, prefix)
        try:
            extent = self.arena.branch(live.extent, prefix, prefix + more)
        except CapacityError:
            assert not fits
            return multiple()
        except ValueError:
            assert not held
            return multiple()
        assert fits and held
        child = Live(extent, live.stamps[:prefix], live)
        live.branches.append(child)
        return self.remember(child)

    @rule(live=sequences, back=st.integers(-1, SLACK))
    def trim(self, live: Live, back: int) -> None:
        """Of a sequence that is over its first positions stay; it is not written again."""
        if live.gone:
            return
        length = len(live.stamps) - back
        before, was = [list(part) for part in self.memory], self.places()
        possible = self.arena.holds(live.extent, length) if length > 0 else False
        done = self.arena.trim(live.extent, length)
        assert self.memory == before
        own = length - live.extent.prefix_len
        if not done:
            assert self.places() == was
            assert not possible or own <= 0 or length < live.extent.pinned
            return
        del live.stamps[length:]
        assert live.extent.places[0][1] == own, "room that nobody needs was kept"
        assert live.extent.capacity == length

    @rule(target=sequences, live=sequences, back=st.integers(0, 24), more=st.integers(1, 8))
    def copy(self, live: Live, back: int, more: int) -> Live | MultipleResults[Live]:
        """A sequence of its own that begins with what another one has."""
        prefix = max(1, len(live.stamps) - back)
        if live.gone:
            return multiple()
        try:
            extent = self.arena.admit(prefix + more)
        except CapacityError:
            return multiple()
        made = Live(extent)
        rings = [
            (live.extent.places[pool][1], extent.places[pool][1])
            for pool in range(1, len(self.pools))
        ]
        copies = self.arena.copies(live.extent, extent, prefix)
        if copies is None:
            held = prefix <= len(live.stamps) and self.arena.holds(live.extent, prefix)
            lost = any(one != two and live.extent.high > one for one, two in rings)
            assert not held or lost or (live.parent is not None and rings)
            return self.remember(made)
        for one in copies:
            memory = self.memory[one.pool]
            assert one.to + one.count <= one.start or one.start + one.count <= one.to
            memory[one.to : one.to + one.count] = memory[one.start : one.start + one.count]
        self.arena.copied(live.extent, extent, prefix)
        made.stamps = live.stamps[:prefix]
        return self.remember(made)

    @rule(size=st.integers(1, 40), data=st.data())
    def fits_without(self, size: int, data: st.DataObject) -> None:
        alive = [live for live in self.known if not live.gone and not live.children()]
        alive = [live for live in alive if live.parent is None]
        chosen = [live for live in alive if data.draw(st.booleans())]
        told = self.arena.fits_without(size, [live.extent for live in chosen])
        for live in chosen:
            live.gone = True
        fits = all(need <= self.largest_gap(pool) for pool, need in enumerate(self.sizes(size)))
        for live in chosen:
            live.gone = False
        assert told == fits

    @rule(live=consumes(sequences))
    def free(self, live: Live) -> None:
        self.arena.free(live.extent)
        self.arena.free(live.extent)  # a second time is a no-op
        live.gone = True

    # --- invariants ---------------------------------------------------------------------------

    @invariant()
    def ownership_is_disjoint(self) -> None:
        for pool, memory in enumerate(self.memory):
            taken = [
                slot for start, size in self.places()[pool] for slot in range(start, start + size)
            ]
            assert len(taken) == len(set(taken))
            assert all(0 <= slot < len(memory) for slot in taken)

    @invariant()
    def slots_are_conserved(self) -> None:
        for pool, allocator in enumerate(self.arena.allocators):
            owned = self.places()[pool]
            assert sorted(allocator._used.items()) == owned
            assert allocator.used == sum(size for _, size in owned)
            free = sorted(allocator._size_at.items())
            assert allocator.used + sum(size for _, size in free) == allocator.tokens
            assert allocator.largest_free == self.largest_gap(pool)
            for (start, size), (following, _) in itertools.pairwise(free):
                assert start + size < following, "free neighbours were not joined"

    @invariant()
    def reads_give_the_log(self) -> None:
        # What the next row reads, in both pools, is what was written at those positions.
        for live in self.known:
            if live.gone:
                continue
            extent, end = live.extent, len(live.stamps)
            assert extent.valid_len == end <= extent.capacity
            for pool, memory in enumerate(self.memory):
                first = self.arena.first_read(pool, end)
                assert first == (0 if pool == 0 else max(0, end - WINDOW + 1))
                found = []
                for part in self.arena.segments(extent, pool, first, end):
                    assert part.position == first + len(found)
                    found += memory[part.slot : part.slot + part.count]
                assert found == live.stamps[first:end]

    # --- the model ----------------------------------------------------------------------------

    def remember(self, live: Live) -> Live:
        self.known.append(live)
        return live

    def sizes(self, capacity: int) -> list[int]:
        """Slots that an admission takes, by pool."""
        return [capacity, min(capacity, WINDOW + SLACK)][: len(self.pools)]

    def places(self) -> list[list[tuple[int, int]]]:
        """Places in use, by pool: those of live sequences, and of parents that branches need."""
        owners = [live for live in self.known if not live.gone or live.children()]
        return [
            sorted(live.extent.places[pool] for live in owners) for pool in range(len(self.pools))
        ]

    def largest_gap(self, pool: int) -> int:
        gap = at = 0
        for start, size in self.places()[pool]:
            gap, at = max(gap, start - at), start + size
        return max(gap, len(self.memory[pool]) - at)


class FullArenaMachine(ArenaMachine):
    """Without rings, where a sequence goes on writing beside its branches."""

    pools = (PoolPlan(FULL_TOKENS),)


SETTINGS = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestArenaMachine = ArenaMachine.TestCase
TestArenaMachine.settings = SETTINGS
TestFullArenaMachine = FullArenaMachine.TestCase
TestFullArenaMachine.settings = SETTINGS


def ring_too_small(patch: pytest.MonkeyPatch) -> None:
    """Two slots fewer than the proof needs at least."""

    def place_size(self: PoolPlan, capacity: int) -> int:
        return capacity if self.window is None else min(capacity, self.window + self.slack - 2)

    patch.setattr(PoolPlan, "place_size", place_size)
    patch.setattr(
        ArenaMachine,
        "sizes",
        lambda self, capacity: [capacity, min(capacity, WINDOW + SLACK - 2)],
    )


def ring_losses_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A rollback is granted whatever the ring has lost."""
    patch.setattr(
        Arena,
        "holds",
        lambda self, e, length: max(e.prefix_len, e.pinned) <= length <= e.valid_len,
    )


def prefix_not_pinned(patch: pytest.MonkeyPatch) -> None:
    """A parent is rolled back into the prefix that its branch reads."""
    branch = Arena.branch

    def unpinned(self: Arena, parent: Extent, prefix_len: int, capacity: int) -> Extent:
        child = branch(self, parent, prefix_len, capacity)
        parent.pinned = 0
        return child

    patch.setattr(Arena, "branch", unpinned)


def free_ranges_not_joined(patch: pytest.MonkeyPatch) -> None:
    """A freed range stays apart from its neighbours."""

    def free(self: SlotAllocator, start: int) -> None:
        size = self._used.pop(start)
        self._used_tokens -= size
        insort(self._starts, start)
        self._size_at[start] = size
        insort(self._by_size, (size, start))

    patch.setattr(SlotAllocator, "free", free)


def rollback_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Rollback says yes and does nothing."""
    patch.setattr(Arena, "rollback", Arena.holds)


@pytest.mark.parametrize(
    "mutation",
    [
        ring_too_small,
        ring_losses_forgotten,
        prefix_not_pinned,
        free_ranges_not_joined,
        rollback_forgotten,
    ],
)
def test_arena_machine_catches(
    mutation: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            ArenaMachine,
            # It stops at the first failure, so many examples cost nothing where one is found.
            settings=settings(
                SETTINGS,
                phases=[Phase.generate],
                print_blob=False,
                max_examples=5000,
                stateful_step_count=80,  # most need a sequence that lives long
            ),
        )
