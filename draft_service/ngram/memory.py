"""What the n-gram draft keeps of sequences: a suffix automaton each, in memory set aside at start.

To sessions it looks like a model with its KV arena: extents are reserved at admission, refused
where there is no room, rolled back and shared.
"""

from __future__ import annotations

import mmap

from outrider.draft_service.ngram.automaton import BYTES_PER_TOKEN, SuffixAutomaton
from outrider.draft_service.ngram.trust import Trust
from outrider.shared.core.errors import ConfigError
from outrider.shared.core.model_facts import ModelFacts
from outrider.shared.kv.arena import Arena, Extent, PoolPlan

ARENA_BYTES = 512 << 20
"""By default; the system gives it page by page, as it is first written."""
MOST_POSITIONS = (1 << 31) - 1


class TextExtent(Extent):
    """One sequence's automaton, and how far its proposals may be trusted."""

    __slots__ = ("automaton", "trust")

    def __init__(self, capacity: int, places: tuple[tuple[int, int], ...], memory: memoryview):
        """``memory``: of the sequence's place."""
        super().__init__(capacity, places)
        self.automaton = SuffixAutomaton(memory)
        self.trust = Trust()


class TextArena(Arena):
    """Admission over one piece of memory, ``BYTES_PER_TOKEN`` a slot."""

    def __init__(self, tokens: int) -> None:
        super().__init__([PoolPlan(tokens)])
        self._memory = memoryview(mmap.mmap(-1, tokens * BYTES_PER_TOKEN)).cast("I")

    def admit(self, capacity: int) -> TextExtent:
        """See ``Arena.admit``."""
        places = self._reserve(capacity)
        (start, size), words = places[0], BYTES_PER_TOKEN // 4
        return TextExtent(capacity, places, self._memory[start * words : (start + size) * words])


class TextMemory:
    """See ``SequenceMemory``."""

    switch = None
    slow_calls = 0
    cores = 1
    branches = False
    works_between = False

    def __init__(self, name: str, arena_bytes: int | None, max_positions: int | None) -> None:
        """None: the default of each. Raises ``ConfigError`` for an arena without room."""
        tokens = (ARENA_BYTES if arena_bytes is None else arena_bytes) // BYTES_PER_TOKEN
        if not tokens:
            raise ConfigError(
                f"arena_bytes: got {arena_bytes}; must be at least {BYTES_PER_TOKEN}, which one "
                "token takes"
            )
        self.arena = TextArena(tokens)
        self.facts = ModelFacts(
            name=name,
            architecture="n-gram",
            parameters=0,
            weight_bytes=0,
            vocab_size=0,
            vocab_fingerprint="",
            max_positions=max_positions or MOST_POSITIONS,
            device="cpu",
            dtype="",
            eos_token_ids=(),
            runner="n-gram",
        )

    def places(self, log_len: int) -> int:
        """See ``Runner.places``."""
        return self.facts.max_positions

    def between(self) -> bool:
        """See ``SequenceMemory``."""
        return False

    def time_device(self, *, timed: bool) -> None:
        """See ``SequenceMemory``."""

    def device_seconds(self) -> float | None:
        """See ``SequenceMemory``."""
        return None

    def finish(self) -> None:
        """See ``Runner.finish``: nothing goes on beside."""

    def share(self, parent: Extent, prefix_len: int, capacity: int) -> Extent:
        """See ``Runner.share``: an extent of its own."""
        extent = self.arena.admit(capacity)
        self.copy(parent, extent, prefix_len)
        return extent

    def copy(self, parent: Extent, extent: Extent, length: int) -> None:
        """See ``Runner.copy``: the text is in the log, and taken into the automaton from there."""
        extent.advance(length)
