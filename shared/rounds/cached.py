"""Cached sequences of an engine: those that are over and whose KV stays for prompts to come.

They live in room that nobody else needs: where an extent does not fit, the one that was cached
first gives way, whichever stream it is of. That is the least recently used one: whoever takes
over a prefix gets a copy, and is cached itself when it is over, so a prefix in use is never only
in an old extent.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from outrider.shared.core.errors import CapacityError
from outrider.shared.kv.arena import Arena, Extent


@dataclass(frozen=True, slots=True)
class CachedSequence:
    """One of them. ``log``: its tokens, of which each has its KV in ``extent``.

    ``long_from``: see ``Span``. ``evicted`` is called when it has given way.
    """

    extent: Extent
    log: list[int]
    long_from: int
    evicted: Callable[[], None]


class CachedSequences:
    """The cached sequences of all streams, the oldest first. The engine's lock serialises."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._cached: dict[Hashable, CachedSequence] = {}
        self.tokens = 0
        """Slots of the first pool that they have."""

    def __len__(self) -> int:
        return len(self._cached)

    def add(self, key: Hashable, sequence: CachedSequence) -> None:
        """Caches what nobody else has under ``key``."""
        self._cached[key] = sequence
        self.tokens += _slots(sequence)

    def find(self, key: Hashable) -> CachedSequence | None:
        """The sequence under ``key``, if it is there."""
        return self._cached.get(key)

    def drop(self, key: Hashable) -> None:
        """Frees one; an unknown key is a no-op."""
        found = self._cached.pop(key, None)
        if found is not None:
            self.tokens -= _slots(found)
            self._arena.free(found.extent)

    def admit(self, capacity: int, wanted: Hashable = None) -> Extent:
        """``Arena.admit``, for which cached sequences give way where they have to; see
        ``reserve``."""
        return self.reserve(lambda: self._arena.admit(capacity), capacity, wanted)

    def reserve(self, take: Callable[[], Extent], slots: int, wanted: Hashable = None) -> Extent:
        """What ``take`` returns, which reserves ``slots``; cached sequences give way for it.

        That under ``wanted`` is the last to do so. None does where it would be in vain. Raises
        ``CapacityError``.
        """
        try:
            return take()
        except CapacityError as error:
            # What live branches share stays where it is, whoever it belongs to.
            order = [key for key, one in self._cached.items() if not one.extent.branches]
            order.sort(key=lambda key: key == wanted)
            extents = [self._cached[key].extent for key in order]
            if error.permanent or not self._arena.fits_without(slots, extents):
                raise
        for key in order:
            self._evict(key)
            if self._arena.fits_without(slots, ()):
                break
        return take()

    def _evict(self, key: Hashable) -> None:
        evicted = self._cached[key].evicted
        self.drop(key)
        evicted()


def _slots(sequence: CachedSequence) -> int:
    """Slots of the first pool."""
    return sequence.extent.places[0][1]
