"""Sequences of one model service: opened, rolled back, refused, freed.

The coordinator's token log is the truth. A service keeps, per sequence, the log as it was told
(``log``) and how much of its KV is valid (``extent.valid_len``); each item says how far it may
rely on that (``base_len``) and brings the rest, so a message may be sent again, or come after a
crash, with the same effect.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from outrider.shared.core.errors import CapacityError, RefusalCode, SequenceRefused
from outrider.shared.core.model_facts import EngineInfo, ModelFacts
from outrider.shared.core.types import Decoding, OpenSequence, Refusal, RoundResult
from outrider.shared.kv.arena import Arena, Extent
from outrider.shared.model.runner import NEVER, RotarySwitch, Span
from outrider.shared.rounds.cached import CachedSequence, CachedSequences

if TYPE_CHECKING:  # an engine without a model starts without torch
    from torch import Tensor

log = logging.getLogger(__name__)


class Item(Protocol):
    """What ``ProposeItem`` and ``VerifyItem`` share."""

    @property
    def sequence_id(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def base_len(self) -> int: ...
    @property
    def append(self) -> tuple[int, ...]: ...


_GIVE_WAY_SECONDS = 1e-3
ItemT = TypeVar("ItemT", bound=Item)
AnswerT = TypeVar("AnswerT")


@dataclass(slots=True)
class Held:
    """One live sequence. ``log``: its tokens as far as the service was told."""

    epoch: int
    decoding: Decoding
    extent: Extent
    log: list[int] = field(default_factory=list)
    long_from: int = NEVER
    """See ``Span``."""


Run = Callable[[Sequence[tuple[ItemT, Held]]], tuple[list[AnswerT | Refusal], int]]
"""See ``Engine.run``."""


class SequenceMemory(Protocol):
    """What sequences of an engine rest on. A ``Runner`` is one: with a model, and KV in the arena.

    Everything is as ``Runner`` says.
    """

    @property
    def facts(self) -> ModelFacts: ...
    @property
    def arena(self) -> Arena: ...
    @property
    def switch(self) -> RotarySwitch | None: ...
    @property
    def slow_calls(self) -> int: ...
    @property
    def works_between(self) -> bool: ...
    def between(self) -> bool: ...
    def time_device(self, *, timed: bool) -> None: ...
    def device_seconds(self) -> float | None: ...
    @property
    def cores(self) -> int: ...
    @property
    def branches(self) -> bool: ...
    def places(self, log_len: int) -> int: ...
    def finish(self) -> None: ...
    def share(self, parent: Extent, prefix_len: int, capacity: int) -> Extent: ...
    def copy(self, parent: Extent, extent: Extent, length: int) -> None: ...


class Engine(ABC, Generic[ItemT, AnswerT]):
    """A model, its arena, and the sequences of every stream.

    Calls may come from any thread; one lock serialises them, so that the device sees one round
    at a time and the arena one owner.
    """

    def __init__(self, runner: SequenceMemory, max_k: int) -> None:
        """``max_k``: most draft tokens in one proposal."""
        limit = runner.arena.max_rows
        if limit is not None and limit < max_k + 1:
            raise ValueError(f"the rings allow {limit} rows, fewer than max_k + 1 = {max_k + 1}")
        self.runner = runner
        self.max_k = max_k
        self.lock = threading.RLock()  # whoever holds it over many rounds goes on serving them
        self.sequences = 0
        """Live ones."""
        self.used_at = 0.0
        """When it last did what somebody waits for, by ``time.monotonic``."""
        self.cached = CachedSequences(runner.arena)

    def give_way(self) -> None:
        """Whoever waits for the engine has it now. A lock that is let go of and taken again at
        once would never be theirs: it takes them a moment to wake."""
        time.sleep(_GIVE_WAY_SECONDS)

    def trial_alone(self, session: Session[ItemT, AnswerT], items: Sequence[ItemT]) -> float | None:
        """Seconds of one of the rounds that this service runs by itself over ``items``, where they
        take another way than those it is asked for; None where they don't."""
        return None

    def connect(self) -> Session[ItemT, AnswerT]:
        """A new stream's sequences."""
        return Session(self)

    @property
    def works_between(self) -> bool:
        """Whether there is ever anything to do while nobody asks for a round; see ``IdleWork``."""
        return self.runner.works_between

    @property
    def cores(self) -> int:
        """Cores of the host that a round keeps busy."""
        return self.runner.cores

    def info(self) -> EngineInfo:
        """The engine as it is now; takes no lock, so that it answers during a round."""
        arena = self.runner.arena
        return EngineInfo(
            self.runner.facts,
            arena_tokens=arena.tokens,
            arena_tokens_used=max(0, arena.used - self.cached.tokens),
            arena_tokens_cached=self.cached.tokens,
            arena_tokens_largest_free=arena.largest_free,
            arena_longest=arena.longest or self.runner.facts.max_positions + self.max_k + 1,
            sequences=self.sequences,
            cached=len(self.cached),
            max_k=self.max_k,
        )

    @property
    @abstractmethod
    def trial_amounts(self) -> tuple[int, ...]:
        """What to time rounds of at start, see ``CostPoint.amount``; the most telling first."""

    @abstractmethod
    def trial(
        self, opened: OpenSequence, base_len: int, tokens: Sequence[int], amount: int
    ) -> ItemT:
        """The item of a round to be timed: of one ``amount`` where the log goes on after
        ``base_len`` with the pending token ``tokens[0]``; the others may be proposed.

        With ``amount`` 0 all of ``tokens`` is only taken in.
        """

    @abstractmethod
    def run(self, work: Sequence[tuple[ItemT, Held]]) -> tuple[list[AnswerT | Refusal], int]:
        """Serves items whose sequences are rolled back to ``base_len`` and ready.

        Returns one answer or refusal per item, and the rows forwarded. Called with the lock held.
        """

    @abstractmethod
    def settle(
        self, work: Sequence[tuple[ItemT, Held]], found: Sequence[Any]
    ) -> tuple[list[AnswerT | Refusal], int]:
        """``run`` where the device has done it all by itself, and ``found`` this for each item.

        The rows stand in the arena; what is left is the bookkeeping.
        """

    def sound(self, item: ItemT) -> ItemT:
        """The item without what nobody can make use of, such as a proposal of unknown ids.

        Whatever way it came: each round of every link passes here, and what the other model said
        is never a reason to refuse a sequence.
        """
        return item

    def rows_of(self, item: ItemT) -> int:
        """Rows that the item will write, from ``base_len`` on."""
        return len(item.append)

    def reject(self, item: ItemT) -> str | None:
        """What is wrong with the item itself, for this engine; None where nothing is."""
        return None

    def tokens_of(self, item: ItemT) -> Sequence[int]:
        """Token ids in the item, all to be below the vocabulary's size."""
        return item.append


class Session(Generic[ItemT, AnswerT]):
    """The sequences of one stream. Ids are unique within it."""

    def __init__(self, engine: Engine[ItemT, AnswerT]) -> None:
        self._engine = engine
        self._held: dict[int, Held] = {}
        self._evicted: list[int] = []
        self._cached: set[int] = set()
        self._released = False
        self.alone: Any = None
        """What the device takes turns with where there is no draft, once it was needed."""

    def open(self, request: OpenSequence) -> None:
        """Reserves the whole extent of a sequence, less what it shares with its parent; cached
        sequences give way where there is no room.

        The same epoch again is a no-op; a higher one frees what was held first. Raises
        ``SequenceRefused``: NO_CAPACITY, STALE_EPOCH or INVALID.
        """
        with self._engine.lock:
            if self._released:
                raise SequenceRefused(RefusalCode.INVALID, "the stream has ended")
            held = self._held.get(request.sequence_id)
            if held is not None:
                if request.epoch == held.epoch:
                    return
                if request.epoch < held.epoch:
                    raise SequenceRefused(
                        RefusalCode.STALE_EPOCH,
                        f"epoch {request.epoch} is older than the open {held.epoch}",
                    )
                self._free(request.sequence_id)
            if request.capacity < 1:
                raise SequenceRefused(
                    RefusalCode.INVALID, f"capacity: got {request.capacity}; must be at least 1"
                )
            switch = self._engine.runner.switch
            long_from = NEVER
            if switch is not None:
                long_from = switch.long_from(request.decoding.prompt_len)
            try:
                extent, tokens = self._reserve(request, long_from)
            except CapacityError as error:
                raise SequenceRefused(RefusalCode.NO_CAPACITY, str(error)) from error
            held = Held(request.epoch, self._decoding(request), extent, tokens, long_from)
            self._held[request.sequence_id] = held
            self._engine.sequences += 1

    def _decoding(self, request: OpenSequence) -> Decoding:
        """How its tokens are chosen; without a limit of ids that this model keeps anyway."""
        decoding, own = request.decoding, self._engine.runner.facts.vocab_size
        return decoding if decoding.vocab_size < own else replace(decoding, vocab_size=0)

    def close(self, sequence_id: int) -> None:
        """Frees a sequence, live or cached; an unknown id is a no-op."""
        with self._engine.lock:
            self._free(sequence_id)
            self._uncache(sequence_id)

    def cache(self, sequence_id: int, length: int) -> None:
        """Ends a sequence and caches its first ``length`` tokens, as far as their KV is held.

        Where that is nothing, it counts as evicted. An unknown id is a no-op.
        """
        engine = self._engine
        with engine.lock:
            held = self._held.pop(sequence_id, None)
            if held is None:
                return
            engine.sequences -= 1
            arena, extent = engine.runner.arena, held.extent
            # A branch is not worth the prompt that it would hold on to.
            if extent.parent is not None or not arena.trim(extent, min(length, extent.valid_len)):
                arena.free(extent)
                self._evicted.append(sequence_id)
                return
            del held.log[extent.valid_len :]

            def evicted() -> None:
                self._cached.remove(sequence_id)
                self._evicted.append(sequence_id)

            # What an earlier sequence that was called so has cached, if there was one.
            self._uncache(sequence_id)
            self._cached.add(sequence_id)
            engine.cached.add(
                (self, sequence_id),
                CachedSequence(extent, held.log, held.long_from, evicted),
            )

    def release(self) -> None:
        """Frees every sequence; the session takes no more."""
        with self._engine.lock:
            self._released = True
            for sequence_id in list(self._held):
                self._free(sequence_id)
            for sequence_id in list(self._cached):
                self._uncache(sequence_id)

    def held(self, sequence_id: int) -> Held:
        """A live sequence. Raises ``SequenceRefused``: UNKNOWN."""
        found = self._held.get(sequence_id)
        if found is None:
            raise SequenceRefused(RefusalCode.UNKNOWN, f"sequence {sequence_id} is not open")
        return found

    @property
    def engine(self) -> Engine[ItemT, AnswerT]:
        """What serves the rounds."""
        return self._engine

    def round(self, items: Sequence[ItemT]) -> RoundResult[AnswerT]:
        """Serves one ragged batch. A bad item becomes a ``Refusal``; the others are served."""
        engine = self._engine
        with engine.lock:
            began = time.perf_counter()
            result = self._served(items, engine.run)
            # Where no token was chosen nobody has looked at a result yet: the rows of a prompt
            # would count as taken in, at once, while the device has them still before it.
            engine.runner.finish()
            result.model_seconds = time.perf_counter() - began
            result.evicted, self._evicted = self._evicted, []
            engine.used_at = time.monotonic()
        return result

    def settle(self, items: Sequence[ItemT], found: Sequence[Any]) -> RoundResult[AnswerT]:
        """``round`` for numbers that are known already: the bookkeeping alone.

        ``found``: for each item what the device found, see ``Engine.settle``. What it took is
        known to the caller alone: ``model_seconds`` is 0.
        """
        engine = self._engine
        known = {item.sequence_id: one for item, one in zip(items, found, strict=True)}
        with engine.lock:
            return self._served(
                items, lambda work: engine.settle(work, [known[one.sequence_id] for one, _ in work])
            )

    def _served(self, items: Sequence[ItemT], run: Run[ItemT, AnswerT]) -> RoundResult[AnswerT]:
        engine = self._engine
        engine.used_at = time.monotonic()
        result: RoundResult[AnswerT] = RoundResult()
        work: list[tuple[ItemT, Held]] = []
        seen: set[int] = set()
        for asked in items:
            item = engine.sound(asked)
            if item is not asked:
                result.cut += engine.rows_of(asked) - engine.rows_of(item)
            try:
                if item.sequence_id in seen:
                    raise SequenceRefused(
                        RefusalCode.INVALID, "the sequence is in this round already"
                    )
                seen.add(item.sequence_id)
                work.append((item, self._prepare(item)))
            except SequenceRefused as error:
                result.refusals.append(refusal(item, error.code, str(error), error.held_len))
        if work:
            answers, result.rows = self._run(work, run)
            for answer in answers:
                if isinstance(answer, Refusal):
                    result.refusals.append(answer)
                else:
                    result.answers.append(answer)
        return result

    def _run(
        self, work: list[tuple[ItemT, Held]], run: Run[ItemT, AnswerT]
    ) -> tuple[list[AnswerT | Refusal], int]:
        try:
            return run(work)
        except Exception as error:
            # A round must answer whatever happens inside it: the peer re-opens from its log.
            # What was written is not trusted.
            log.exception("the forward of %d sequences failed", len(work))
            message = f"the forward failed: {type(error).__name__}: {error}"
            for item, held in work:
                self._engine.runner.arena.distrust(held.extent, item.base_len)
            return [refusal(item, RefusalCode.MODEL, message) for item, _ in work], 0

    def _prepare(self, item: ItemT) -> Held:
        """Checks one item and rolls its sequence back to ``base_len``."""
        held = self._held.get(item.sequence_id)
        if held is None or item.epoch > held.epoch:
            opened = "not open" if held is None else f"open with epoch {held.epoch}"
            raise SequenceRefused(
                RefusalCode.UNKNOWN, f"sequence {item.sequence_id} epoch {item.epoch} is {opened}"
            )
        if item.epoch < held.epoch:
            raise SequenceRefused(
                RefusalCode.STALE_EPOCH, f"epoch {item.epoch} is older than the open {held.epoch}"
            )
        engine, extent = self._engine, held.extent
        facts, arena = engine.runner.facts, engine.runner.arena
        wrong = engine.reject(item)
        if wrong is not None:
            raise SequenceRefused(RefusalCode.INVALID, wrong)
        end = item.base_len + engine.rows_of(item)
        if end > extent.capacity:
            raise SequenceRefused(
                RefusalCode.INVALID, f"rows up to {end} exceed the capacity {extent.capacity}"
            )
        if end > facts.max_positions:
            raise SequenceRefused(
                RefusalCode.INVALID, f"rows up to {end} exceed the context {facts.max_positions}"
            )
        for token in engine.tokens_of(item):
            if not 0 <= token < facts.vocab_size:
                raise SequenceRefused(
                    RefusalCode.INVALID,
                    f"token id {token} is outside the vocabulary of {facts.vocab_size}",
                )
        if item.base_len > extent.valid_len:
            raise SequenceRefused(
                RefusalCode.KV_MISSING,
                f"base_len {item.base_len} is more than the {extent.valid_len} held",
                held_len=extent.valid_len,
            )
        if item.base_len < extent.pinned:
            raise SequenceRefused(
                RefusalCode.KV_MISSING,
                f"base_len {item.base_len} is within the {extent.pinned} that samples share",
                held_len=extent.valid_len,
            )
        self._lengthen(item, held)
        if not arena.rollback(extent, item.base_len):
            extent.clear()
            raise SequenceRefused(
                RefusalCode.KV_MISSING,
                f"a sliding window's KV before {item.base_len} was overwritten",
                held_len=extent.valid_len,
            )
        del held.log[item.base_len :]
        held.log.extend(item.append)
        return held

    def _lengthen(self, item: ItemT, held: Held) -> None:
        """Counts the sequence as long from now on, if it has become so with this item.

        Where all of it is to be taken in anew then, raises ``SequenceRefused``: KV_MISSING.
        """
        switch = self._engine.runner.switch
        if switch is None or not switch.anew or held.long_from == 0:
            return
        if item.base_len + len(item.append) > switch.border:
            held.long_from = 0
            if item.base_len:
                held.extent.clear()
                raise SequenceRefused(
                    RefusalCode.KV_MISSING,
                    f"beyond {switch.border} tokens all of the sequence is read anew",
                )

    def _reserve(self, request: OpenSequence, long_from: int) -> tuple[Extent, list[int]]:
        """An extent, and the tokens whose KV it holds: those shared with a parent, or none.

        Where the parent is gone, or no longer holds the prefix, there is nothing to share: the
        coordinator sends those tokens. Raises ``CapacityError``.
        """
        engine, prefix, capacity = self._engine, request.prefix_len, request.capacity
        runner, cached = engine.runner, engine.cached
        parent: Held | CachedSequence | None = None
        if request.parent_id is not None and 0 < prefix < capacity:
            parent = self._held.get(request.parent_id)
            if parent is None and request.copy:
                parent = cached.find((self, request.parent_id))
        if parent is None:
            return cached.admit(capacity), []
        if request.copy:
            return self._copied(parent, request, long_from)
        shared = parent.extent
        if (
            shared.parent is not None
            or (runner.switch is not None and runner.switch.anew)
            or not runner.arena.holds(shared, prefix)
        ):
            return cached.admit(capacity), []
        extent = cached.reserve(
            lambda: runner.share(shared, prefix, capacity),
            capacity - prefix if runner.branches else capacity,
        )
        return extent, parent.log[: extent.valid_len]

    def _copied(
        self, parent: Held | CachedSequence, request: OpenSequence, long_from: int
    ) -> tuple[Extent, list[int]]:
        """An extent of its own with a copy of what ``parent`` holds of the prefix."""
        engine = self._engine
        extent = engine.cached.admit(request.capacity, (self, request.parent_id))
        length = min(request.prefix_len, parent.extent.valid_len)
        # The parent may have given way itself; and the same tokens have another KV where one of
        # the two counts as long before the prefix ends.
        if not parent.extent.freed and min(parent.long_from, length) == min(long_from, length):
            engine.runner.copy(parent.extent, extent, length)
        return extent, parent.log[: extent.valid_len]

    def _free(self, sequence_id: int) -> None:
        held = self._held.pop(sequence_id, None)
        if held is not None:
            self._engine.runner.arena.free(held.extent)
            self._engine.sequences -= 1

    def _uncache(self, sequence_id: int) -> None:
        self._cached.discard(sequence_id)
        self._engine.cached.drop((self, sequence_id))


def refusal(item: Item, code: RefusalCode, message: str, held_len: int = 0) -> Refusal:
    """The refusal of ``item``."""
    return Refusal(item.sequence_id, item.epoch, int(code), message, held_len)


def finite_rows(logits: Tensor) -> list[bool]:
    """For each row of ``logits``: whether its largest value is a finite number.

    A NaN anywhere in the row makes the largest NaN; -inf entries are legal masks.
    """
    return [math.isfinite(largest) for largest in logits.amax(-1).tolist()]


def spans_of(
    work: Sequence[tuple[Any, Held]], tokens: Sequence[Sequence[int]], wanted: Sequence[int]
) -> list[Span]:
    """Spans that continue each extent at its valid length; those without rows are left out."""
    return [
        Span(held.extent, held.extent.valid_len, rows, count, held.long_from)
        for (_, held), rows, count in zip(work, tokens, wanted, strict=True)
        if rows
    ]
