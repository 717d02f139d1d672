"""Contiguous token slots, reserved whole and given back: the arena's allocator. Integers only."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from outrider.shared.core.errors import CapacityError


class SlotAllocator:
    """Best-fit allocator of contiguous slots with a coalescing free list.

    The free extents are kept in two orders: by address (to coalesce) and by size (to find the
    smallest that fits, the lowest address among equals). Both are sorted lists searched by
    bisection: with a thousand live extents a step is a few comparisons and one short
    ``memmove``, a few microseconds in all.
    """

    def __init__(self, tokens: int) -> None:
        """``tokens``: slots in all, at least 1."""
        if tokens < 1:
            raise ValueError(f"tokens: got {tokens}; must be at least 1")
        self.tokens = tokens
        self._used: dict[int, int] = {}
        self._used_tokens = 0
        self._starts: list[int] = [0]
        self._size_at: dict[int, int] = {0: tokens}
        self._by_size: list[tuple[int, int]] = [(tokens, 0)]

    @property
    def used(self) -> int:
        """Slots reserved."""
        return self._used_tokens

    @property
    def largest_free(self) -> int:
        """Slots of the largest free extent: the largest request that would fit now."""
        return self._by_size[-1][0] if self._by_size else 0

    def reserve(self, size: int) -> int:
        """Reserves ``size`` contiguous slots; returns the first.

        Raises ``CapacityError``: permanent where the pool is smaller than ``size``.
        """
        if size < 1:
            raise ValueError(f"size: got {size}; must be at least 1")
        index = bisect_left(self._by_size, (size, -1))
        if index == len(self._by_size):
            self._refuse(size)
        held, start = self._by_size.pop(index)
        if held == size:
            del self._starts[bisect_left(self._starts, start)]
            del self._size_at[start]
        else:
            # The remainder takes the place of its free extent: the address order stays.
            rest = start + size
            self._starts[bisect_left(self._starts, start)] = rest
            del self._size_at[start]
            self._size_at[rest] = held - size
            insort(self._by_size, (held - size, rest))
        self._used[start] = size
        self._used_tokens += size
        return start

    def free(self, start: int) -> None:
        """Frees the extent at ``start``; it joins its free neighbours."""
        size = self._used.pop(start)
        self._used_tokens -= size
        index = bisect_left(self._starts, start)
        if index < len(self._starts) and self._starts[index] == start + size:
            following = self._starts.pop(index)
            size += self._drop(following)
        if index > 0:
            before = self._starts[index - 1]
            held = self._size_at[before]
            if before + held == start:
                self._drop(before)
                self._size_at[before] = held + size
                insort(self._by_size, (held + size, before))
                return
        self._starts.insert(index, start)
        self._size_at[start] = size
        insort(self._by_size, (size, start))

    def shrink(self, start: int, size: int) -> None:
        """Gives back all but the first ``size`` slots, at least 1, of the extent at ``start``."""
        held = self._used[start]
        if not 1 <= size <= held:
            raise ValueError(f"size: got {size}; must be in 1..{held}")
        if size < held:
            self._used[start] = size
            self._used[start + size] = held - size
            self.free(start + size)

    def fits_without(self, size: int, starts: Iterable[int]) -> bool:
        """Whether ``size`` slots would fit if the extents at ``starts`` were free."""
        free = sorted([*self._size_at.items(), *((one, self._used[one]) for one in starts)])
        begin = end = 0
        for start, held in free:
            if start != end:
                begin = start
            end = start + held
            if end - begin >= size:
                return True
        return False

    def _drop(self, start: int) -> int:
        """Takes a free extent out of the size order; returns its size."""
        size = self._size_at.pop(start)
        del self._by_size[bisect_left(self._by_size, (size, start))]
        return size

    def _refuse(self, size: int) -> None:
        if size > self.tokens:
            raise CapacityError(
                f"{size} token slots can never fit: the arena has {self.tokens}", permanent=True
            )
        raise CapacityError(
            f"{size} token slots do not fit now: {self.tokens - self.used} of {self.tokens} are "
            f"free, the largest free extent has {self.largest_free}"
        )
