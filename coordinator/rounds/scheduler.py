"""Which sequences run in a round. Pure policy: neither torch nor gRPC, no clock.

Waiting is first come, first served: the head of the queue is admitted as soon as there is room,
and once it was refused nobody overtakes it, so a large request is never starved by small ones.
Prompts are taken in beside those that decode, in the same round: all prompts of a round share
one budget of rows, which says how long a round may take for their sake (``costs``). Half
of it is handed out in the order of arrival, so that the oldest prompt always goes on; the other
half, and what is left of the first, goes to the prompts that are nearest to their end, so that a
short one does not stand behind a very long one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from outrider.shared.core.errors import CapacityError


class Schedulable(Protocol):
    """What the scheduler has to know of a sequence."""

    @property
    def missing(self) -> int:
        """Rows that the verifier must take in before it writes a token; 1 while decoding."""

    @property
    def ready(self) -> bool:
        """Whether it may run now: not while it waits for a prompt that it shares."""

    @property
    def shares(self) -> bool:
        """Whether others wait for its prompt: that is taken in before anything is decoded."""


class Budget(Protocol):
    """Says how many rows of prompts a round takes in."""

    def rows(self, *, delays: bool) -> int:
        """>= 1; ``delays``: whether sequences decode in the round."""


SequenceT = TypeVar("SequenceT", bound=Schedulable)


@dataclass(slots=True)
class RoundPlan(Generic[SequenceT]):
    """One round."""

    decode: list[SequenceT] = field(default_factory=list)
    """One pending token each: these may have proposals."""
    prefill: list[tuple[SequenceT, int]] = field(default_factory=list)
    """Sequences with the rows of their prompt to take in now."""
    held: list[SequenceT] = field(default_factory=list)
    """They might decode and sit the round out: their tokens depend on proposals, and the draft
    is not there yet."""

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill)


class Scheduler(Generic[SequenceT]):
    """The waiting queue and the running set."""

    def __init__(self, *, max_running: int, max_waiting: int, budget: Budget) -> None:
        """``max_running`` and ``max_waiting`` in sequences."""
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._budget = budget
        self._waiting: deque[SequenceT] = deque()
        # A dict keeps the order of admission and forgets in constant time.
        self._running: dict[SequenceT, None] = {}
        self._full = False

    @property
    def running(self) -> list[SequenceT]:
        """Admitted sequences, oldest first."""
        return list(self._running)

    @property
    def admitted(self) -> int:
        """How many sequences are admitted."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences that wait for admission."""
        return len(self._waiting)

    @property
    def admits(self) -> bool:
        """Whether the next plan will try to admit one that waits."""
        return bool(self._waiting) and not self._full and len(self._running) < self._max_running

    @property
    def full(self) -> bool:
        """Whether the head of the queue was refused for want of room."""
        return self._full

    def submit(self, sequences: Iterable[SequenceT]) -> None:
        """Queues the sequences of one request; raises ``CapacityError`` when the queue is full.

        Those that can run at once do not count as waiting.
        """
        new = list(sequences)
        free = 0 if self._full else max(0, self._max_running - len(self._running))
        over = len(self._waiting) + len(new) - free
        if over > self._max_waiting:
            raise CapacityError(
                f"{len(self._running)} sequences are running (at most {self._max_running}) and "
                f"{len(self._waiting)} wait (at most {self._max_waiting}); try again later"
            )
        self._waiting.extend(new)

    def remove(self, sequence: SequenceT) -> None:
        """Forgets a sequence, running or waiting; the room it had is free."""
        if sequence in self._running:
            del self._running[sequence]
            self._full = False
        elif sequence in self._waiting:
            if self._waiting[0] is sequence:
                self._full = False  # the next one may be smaller
            self._waiting.remove(sequence)

    def refuse(self, sequence: SequenceT) -> None:
        """The services have no room for a sequence just admitted: it is the next to be tried."""
        del self._running[sequence]
        self._waiting.appendleft(sequence)
        self._full = True

    def retry(self) -> None:
        """Room may have been made elsewhere: the head of the queue is tried again."""
        self._full = False

    def drop_all(self) -> list[SequenceT]:
        """Forgets everything and returns it, running ones first."""
        everything = [*self._running, *self._waiting]
        self._running.clear()
        self._waiting.clear()
        self._full = False
        return everything

    def plan(self) -> RoundPlan[SequenceT]:
        """Admits what fits and lays out the next round; an empty plan when nothing can run."""
        while self._waiting and not self._full and len(self._running) < self._max_running:
            self._running[self._waiting.popleft()] = None
        made: RoundPlan[SequenceT] = RoundPlan()
        prompts: list[tuple[SequenceT, int]] = []
        for sequence in self._running:
            if not sequence.ready:
                continue
            missing = sequence.missing
            if missing <= 1:
                made.decode.append(sequence)
            else:
                prompts.append((sequence, missing - sequence.shares))
        if prompts:
            budget = self._budget.rows(delays=bool(made.decode))
            shares = share_out([rows for _, rows in prompts], budget)
            made.prefill = [
                (sequence, rows)
                for (sequence, _), rows in zip(prompts, shares, strict=True)
                if rows
            ]
        return made


def share_out(wanted: Sequence[int], budget: int) -> list[int]:
    """How many of ``budget`` rows each prompt gets; ``wanted``: what each lacks, oldest first.

    All of the budget is handed out where so much is wanted, and the oldest has at least half.
    """
    given = [0] * len(wanted)

    def hand_out(order: Iterable[int], rows: int) -> int:
        for i in order:
            taken = min(rows, wanted[i] - given[i])
            given[i] += taken
            rows -= taken
        return rows

    left = hand_out(range(len(wanted)), budget - budget // 2)
    hand_out(sorted(range(len(wanted)), key=wanted.__getitem__), budget // 2 + left)
    return given
