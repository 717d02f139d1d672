"""The KV arena's bookkeeping: who owns which token slots. Integers only, no tensors.

A *pool* is a range of token slots ``0 … tokens-1`` of one KV tensor; layers of equal kind
share a pool. A sequence owns one *extent*: one contiguous *place* in every pool.

* In a pool of full-attention layers the place has ``capacity`` slots and position ``p`` of the
  sequence lives in slot ``start + p``.
* In a pool of sliding-window layers the place is a *ring* of ``min(capacity, window + slack)``
  slots and position ``p`` lives in slot ``start + p % size``.

Rollback is ``extent.valid_len = smaller``: nothing is moved, copied or cleared.

Why a ring survives every legal rollback. Let ``W`` be the window (a row at position ``q`` reads
positions ``q-W+1 … q``), ``S = W + slack`` the ring's size, and ``high`` one more than the largest
position ever written since the extent was empty. Writing position ``p`` destroys position
``p-S`` and nothing else, so exactly the positions ``< high-S`` are lost. After a rollback to
``b`` the next forward reads from ``b-W+1`` on; all of it is there iff ``high-S <= b-W+1``,
that is ``high - b <= slack + 1``. A forward takes at most ``slack`` rows a sequence, and the
protocol rolls back at most to where the last message started, so ``high - b <= slack``.
``holds(b)`` is this test; a rollback further than that is refused as missing KV and the
tokens are sent again. Within one forward that starts at ``b`` with ``R <= slack`` rows, the first
row reads from ``b-W+1`` while the last writes ``b+R-1`` and so destroys ``b+R-1-S < b-W+1``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from outrider.shared.core.errors import CapacityError
from outrider.shared.kv.slots import SlotAllocator


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """One pool: ``tokens`` slots; ``window`` is None for full attention.

    ``slack``: for rings, slots beyond the window; the most rows a sequence may have in one
    forward, at least ``K_max + 1``.
    """

    tokens: int
    window: int | None = None
    slack: int = 0

    def place_size(self, capacity: int) -> int:
        """Slots that a sequence of ``capacity`` tokens owns in this pool."""
        if self.window is None:
            return capacity
        return min(capacity, self.window + self.slack)


@dataclass(frozen=True, slots=True)
class Segment:
    """``count`` positions from ``position`` on, in the slots from ``slot`` on."""

    slot: int
    position: int
    count: int


@dataclass(frozen=True, slots=True)
class Copy:
    """``count`` slots of a pool, from ``start`` on, whose contents go to those from ``to`` on."""

    pool: int
    start: int
    to: int
    count: int


class Extent:
    """What one sequence owns: a place in every pool, and how much of it is valid.

    ``capacity``: positions ``0 … capacity-1`` may be written. ``valid_len``: positions whose KV
    is valid. ``high``: one more than the largest position written since the extent was empty.
    A *branch* owns only positions from ``prefix_len`` on; those before are its parent's, where
    the positions below ``pinned`` stay as they are while ``branches`` live.
    """

    __slots__ = (
        "branches",
        "capacity",
        "freed",
        "high",
        "parent",
        "pinned",
        "places",
        "prefix_len",
        "valid_len",
    )

    def __init__(self, capacity: int, places: tuple[tuple[int, int], ...]) -> None:
        """``places``: (start, size) in every pool."""
        self.capacity = capacity
        self.places = places
        self.valid_len = 0
        self.high = 0
        self.parent: Extent | None = None
        self.prefix_len = 0
        self.branches = 0
        self.pinned = 0
        self.freed = False

    @property
    def start(self) -> int:
        """First slot in the first pool."""
        return self.places[0][0]

    def begin(self, end: int) -> None:
        """Positions up to ``end`` (exclusive) are about to be written.

        Noted before, not after: a forward that fails half-way has overwritten ring slots too.
        """
        if end > self.high:
            self.high = end

    def advance(self, end: int) -> None:
        """Positions up to ``end`` (exclusive) were written and are valid."""
        self.begin(end)
        self.valid_len = end

    def clear(self) -> None:
        """Nothing is valid any more; lost ring positions are forgotten."""
        self.valid_len = self.prefix_len
        self.high = self.prefix_len


class Arena:
    """Admission and index arithmetic over all pools. Knows no tensor.

    Thread-safety: none; the engine's lock serialises.
    """

    def __init__(self, pools: Sequence[PoolPlan]) -> None:
        """At least one pool; full-attention pools first where there are any."""
        if not pools:
            raise ValueError("an arena needs at least one pool")
        self.pools = tuple(pools)
        self.allocators = tuple(SlotAllocator(pool.tokens) for pool in pools)

    @property
    def max_rows(self) -> int | None:
        """Most rows a sequence may have in one forward; None where nothing limits it."""
        slacks = [pool.slack for pool in self.pools if pool.window is not None]
        return min(slacks) if slacks else None

    @property
    def tokens(self) -> int:
        """Slots of the pool that fills first for long sequences (the first pool)."""
        return self.pools[0].tokens

    @property
    def longest(self) -> int | None:
        """Largest capacity that can ever be admitted; None where nothing limits it: a ring holds
        the end of any sequence."""
        whole = [pool.tokens for pool in self.pools if pool.window is None]
        return min(whole) if whole else None

    @property
    def used(self) -> int:
        """Slots reserved in the first pool."""
        return self.allocators[0].used

    @property
    def largest_free(self) -> int:
        """Largest free extent of the first pool."""
        return self.allocators[0].largest_free

    def room(self, capacity: int) -> int:
        """Sequences of ``capacity`` tokens that the largest free extents of the pools hold."""
        return min(
            allocator.largest_free // pool.place_size(capacity)
            for pool, allocator in zip(self.pools, self.allocators, strict=True)
        )

    def admit(self, capacity: int) -> Extent:
        """Reserves the whole extent of a sequence, in every pool or in none.

        Raises ``CapacityError``: permanent where ``capacity`` can never fit.
        """
        return Extent(capacity, self._reserve(capacity))

    def branch(self, parent: Extent, prefix_len: int, capacity: int) -> Extent:
        """A tail that shares the first ``prefix_len`` valid positions of ``parent``.

        ``capacity`` counts the prefix. The prefix is frozen while the branch lives: the parent
        may not be rolled back below it, and where there are rings it may not be written. The
        parent's slots outlive ``free(parent)`` until its last branch is freed.
        """
        if parent.freed:
            raise ValueError("the extent was freed")
        if not 0 < prefix_len <= parent.valid_len or not self.holds(parent, prefix_len):
            raise ValueError(f"prefix_len: got {prefix_len}; must be in 1..{parent.valid_len}")
        if capacity <= prefix_len:
            raise ValueError(f"capacity: got {capacity}; must be above prefix_len {prefix_len}")
        if parent.parent is not None:
            raise ValueError("a branch can't be branched again: branch its parent")
        child = Extent(capacity, self._reserve(capacity - prefix_len))
        child.parent = parent
        child.prefix_len = child.valid_len = child.high = prefix_len
        parent.branches += 1
        parent.pinned = max(parent.pinned, prefix_len)
        return child

    def free(self, extent: Extent) -> None:
        """Gives an extent's slots back; a second free is a no-op."""
        if extent.freed:
            return
        extent.freed = True
        if extent.branches == 0:
            self._release(extent)

    def trim(self, extent: Extent, length: int) -> bool:
        """Gives back what lies behind ``length``, which becomes its capacity and valid length.

        False (and nothing done) where that isn't held, where branches still read what lies
        behind it, or where nothing of the extent's own would be left.
        """
        if length <= extent.prefix_len or not self.rollback(extent, length):
            return False
        own = length - extent.prefix_len
        # A ring whose end has come round to its start stays as it is: positions lie where they
        # do because of its size.
        unturned = not self._turned(extent)
        places = []
        for pool, allocator, (start, size) in zip(
            self.pools, self.allocators, extent.places, strict=True
        ):
            if (pool.window is None or unturned) and own < size:
                allocator.shrink(start, own)
                size = own
            places.append((start, size))
        extent.places = tuple(places)
        extent.capacity = length
        if unturned:
            extent.high = length
        return True

    def copies(self, source: Extent, target: Extent, length: int) -> list[Copy] | None:
        """What to copy so that the first ``length`` positions of ``source`` are those of
        ``target``, which is empty, too; None where the next row would lack some.

        That is where ``source`` does not hold them, or has lost some in a ring of another size.
        """
        turned = self._turned(source)
        if not 0 < length < target.capacity or not self.holds(source, length):
            return None
        if source.parent is not None and self.max_rows is not None:
            return None  # what the parent's rings have lost since is not noted here
        made = []
        for number, pool in enumerate(self.pools):
            first = 0
            if pool.window is not None:
                size = source.places[number][1]
                if turned and size != target.places[number][1]:
                    return None
                first = max(0, source.high - size)
            for here in self.segments(source, number, first, length):
                # Contiguous here is not contiguous there, where one of the two is a ring.
                for there in self.segments(
                    target, number, here.position, here.position + here.count
                ):
                    start = here.slot + there.position - here.position
                    made.append(Copy(number, start, there.slot, there.count))
        return made

    def copied(self, source: Extent, target: Extent, length: int) -> None:
        """``copies`` were made: their positions are valid in ``target``."""
        # Rings of one size with the same contents lack the same positions.
        target.high = source.high if self._turned(source) else length
        target.valid_len = length

    def fits_without(self, capacity: int, extents: Sequence[Extent]) -> bool:
        """Whether ``admit(capacity)`` would succeed if ``extents`` were freed before."""
        return all(
            allocator.fits_without(
                pool.place_size(capacity), [extent.places[number][0] for extent in extents]
            )
            for number, (pool, allocator) in enumerate(
                zip(self.pools, self.allocators, strict=True)
            )
        )

    def _turned(self, extent: Extent) -> bool:
        """Whether any ring of it has lost positions."""
        return any(
            pool.window is not None and extent.high - extent.prefix_len > size
            for pool, (_, size) in zip(self.pools, extent.places, strict=True)
        )

    def holds(self, extent: Extent, length: int) -> bool:
        """Whether everything a row at position ``length`` reads is still there."""
        if not extent.prefix_len <= length <= extent.valid_len:
            return False
        return length == extent.prefix_len == 0 or all(
            pool.window is None
            or extent.high - size <= max(extent.prefix_len, length - pool.window + 1)
            for pool, (_, size) in zip(self.pools, extent.places, strict=True)
        )

    def rollback(self, extent: Extent, length: int) -> bool:
        """Sets the valid length to ``length``; False (and nothing done) where it isn't held, or
        where branches still read what lies behind it."""
        if length < extent.pinned or not self.holds(extent, length):
            return False
        if length == extent.prefix_len:
            extent.clear()
        else:
            extent.valid_len = length
        return True

    def distrust(self, extent: Extent, length: int) -> None:
        """Nothing from ``length`` on counts as valid; nothing at all where that isn't held."""
        if not self.rollback(extent, min(length, extent.valid_len)):
            extent.clear()

    def check_write(self, extent: Extent, start: int, rows: int) -> None:
        """Raises ``ValueError`` where positions ``start … start+rows-1`` may not be written."""
        end = start + rows
        if extent.freed:
            raise ValueError("the extent was freed")
        if start != extent.valid_len:
            raise ValueError(f"rows start at {start}; the valid length is {extent.valid_len}")
        if end > extent.capacity:
            raise ValueError(f"rows end at {end}; the capacity is {extent.capacity}")
        if start < extent.pinned:
            raise ValueError(f"rows start at {start}; branches read up to {extent.pinned}")
        limit = self.max_rows
        if limit is not None:
            if rows > limit:
                raise ValueError(f"{rows} rows of one sequence; the rings allow {limit}")
            if extent.branches:
                raise ValueError("the rings of an extent with live branches are frozen")

    def segments(self, extent: Extent, pool: int, first: int, end: int) -> list[Segment]:
        """Where positions ``first … end-1`` live, in position order.

        One segment in a full pool; up to two in a ring; those of the parent's prefix before.
        """
        found: list[Segment] = []
        own = extent.prefix_len
        if first < own and extent.parent is not None:
            found = self.segments(extent.parent, pool, first, min(end, own))
            first = own
        if first >= end:
            return found
        start, size = extent.places[pool]
        offset = (first - own) % size
        count = min(end - first, size - offset)
        found.append(Segment(start + offset, first, count))
        if first + count < end:
            found.append(Segment(start, first + count, end - first - count))
        return found

    def first_read(self, pool: int, position: int) -> int:
        """First position that a row at ``position`` reads in this pool."""
        window = self.pools[pool].window
        return 0 if window is None else max(0, position - window + 1)

    def _reserve(self, capacity: int) -> tuple[tuple[int, int], ...]:
        places: list[tuple[int, int]] = []
        try:
            for pool, allocator in zip(self.pools, self.allocators, strict=True):
                size = pool.place_size(capacity)
                places.append((allocator.reserve(size), size))
        except CapacityError:
            for (start, _), allocator in zip(places, self.allocators, strict=False):
                allocator.free(start)
            raise
        return tuple(places)

    def _release(self, extent: Extent) -> None:
        for (start, _), allocator in zip(extent.places, self.allocators, strict=True):
            allocator.free(start)
        parent = extent.parent
        if parent is not None:
            parent.branches -= 1
            if parent.branches == 0:
                parent.pinned = 0
                if parent.freed:
                    self._release(parent)
