"""Turns of draft and verifier that the device takes by itself.

In a turn the device waits until the other side has rung, reads what stands in the device
mailbox, forwards, chooses, writes its answer there and rings. The host queues a turn, looks on,
and does the bookkeeping afterwards from the numbers that the turn left in pinned memory. So the
numbers of a step (tokens, positions, lengths), which otherwise come from the host, live on the
device and go on by themselves: kernels ``take``, ``settle`` and ``follow``.

The draft forwards two rows a sequence in each turn, the last two of the log. After full
acceptance it lacks the KV of both; otherwise it writes the first of them again as it was. That
way every turn has the same shape, and costs the same: the weights are read once either way.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.kernels.attention_shapes import Heads, need
from outrider.shared.core.links import TURNS_AHEAD
from outrider.shared.core.types import Decoding
from outrider.shared.kv.arena import Extent
from outrider.shared.link.device.mailbox import ENDED, DeviceMailbox, bell
from outrider.shared.model.cuda.forward import Forward
from outrider.shared.model.cuda.inputs import Field, Inputs
from outrider.shared.model.cuda.passes import HEAD_ROWS, MAX_SEQUENCES, POWERS, bucket
from outrider.shared.model.cuda.step import numbers, places
from outrider.shared.model.cuda.support import simple
from outrider.shared.model.cuda.turns.stream import DeviceStream, Mark

_LOOK_SECONDS = 1e-4
SLOTS = (*range(1, 9), 10, 12, 16, 20, 24, 32, 40, 48, 56, MAX_SEQUENCES)
"""Numbers of sequences that turns are launched for: they come and go all the time, and each number
costs a capture of some milliseconds."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What turns need of a runner."""

    step: Forward
    heads: Heads
    pools: int
    max_k: int
    device: torch.device


@dataclass(frozen=True, slots=True)
class TurnSequence:
    """Where one sequence stands when turns begin: the KV of all but the pending token is there."""

    extent: Extent
    decoding: Decoding
    before: int
    """The token before the pending one."""
    pending: int
    committed_len: int
    k: int
    limit: int
    """Committed length at which it goes no further."""


class Turns(ABC):
    """One side's turns over one mailbox. Calls come from one thread, in the model's context."""

    _least_k = 1
    _written = 2
    """Rows at the end of the log that a turn writes: the draft's may write one anew."""

    def __init__(self, parts: Parts, mailbox: DeviceMailbox, stream: DeviceStream) -> None:
        self._parts, self._mailbox, self._stream = parts, mailbox, stream
        self._inputs = Inputs(
            [
                *numbers(parts.pools, parts.max_k),
                Field("committed", (MAX_SEQUENCES,)),
                Field("limits", (MAX_SEQUENCES,)),
                Field("ks", (MAX_SEQUENCES,)),
            ],
            parts.device,
        )
        self._ready: set[tuple[int, int]] = set()
        self._grant = self._count = self._slots = self._steps = 0
        self.turn = -1
        """Number of the turn that was queued last, from 0 within a grant."""
        self._began: Mark | None = None
        self._done: Mark | None = None

    def why_not(self, sequences: Sequence[TurnSequence]) -> str | None:
        """Why the device can't take turns for these sequences; None where it can."""
        layout, steps = self._mailbox.layout, max((one.k for one in sequences), default=0)
        if not 0 < len(sequences) <= min(layout.max_sequences, MAX_SEQUENCES):
            return f"{len(sequences)} sequences; the mailbox has {layout.max_sequences}"
        if not self._least_k <= steps <= min(layout.max_k, self._parts.max_k):
            return f"K is {steps}; at most {min(layout.max_k, self._parts.max_k)}"
        width = self._width(steps)
        if width * len(sequences) > HEAD_ROWS:
            return f"{width * len(sequences)} rows in a turn; at most {HEAD_ROWS}"
        for one in sequences:
            if not simple(one.decoding):
                return "a sequence's tokens are not chosen by temperature and noise alone"
            if one.committed_len < self._written:
                return "a sequence has a single token"
            if one.committed_len - self._written < one.extent.prefix_len:
                return "a turn would write to the prefix that a sequence shares"
            if one.limit + steps > one.extent.capacity:
                return f"a sequence may reach {one.limit} of {one.extent.capacity} places"
        ends = [one.limit + steps for one in sequences]
        if need(self._parts.heads, ends, bucket(width, POWERS)) > self._parts.step.limits.work:
            return "attention's scratch memory is too small for these lengths"
        return None

    def start(self, grant: int, sequences: Sequence[TurnSequence]) -> None:
        """Brings the numbers that the first turn begins with; ``why_not`` had no objection."""
        self._grant, self._count = grant, len(sequences)
        steps = max(one.k for one in sequences)
        self.rehearse(self._slots_for(self._count, steps), steps)
        self.turn = -1
        host = self._inputs.host
        places(host, [one.extent for one in sequences])
        for s, one in enumerate(sequences):
            host["committed"][s], host["pending"][s] = one.committed_len, one.pending
            host["limits"][s], host["ks"][s] = one.limit, one.k
            self._place(s, one)
        self._inputs.upload()

    def sizes_ahead(self) -> list[tuple[int, int]]:
        """(Slots, K) of the turns that are worth rehearsing before they are asked for."""
        layout, steps = self._mailbox.layout, min(self._mailbox.layout.max_k, self._parts.max_k)
        return [
            (slots, k)
            for k, most in reversed(TURNS_AHEAD)
            for slots in SLOTS
            if k <= steps
            and slots <= min(most, layout.max_sequences)
            and slots * self._width(k) <= HEAD_ROWS
        ]

    def rehearse(self, slots: int, steps: int) -> None:
        """Has the next turns be of ``slots`` sequences and up to ``steps`` tokens, with all their
        numbers at 0; the first time it compiles and captures what they launch.

        With every limit at 0 nothing is written and nobody is answered. It is done before a turn
        is queued: a capture waits for the device and the device, in a turn, for the other side.
        """
        self._slots, self._steps = slots, steps
        host = self._inputs.host
        for name in host:
            host[name][...] = 0
        if self._sizes() in self._ready:
            return
        self._inputs.upload()
        for _ in range(2):
            self._rehearse()
        self._ready |= self._rehearsed()
        rehearsed = self._stream.mark()
        while not rehearsed.reached():  # the upload still reads what is written next
            time.sleep(_LOOK_SECONDS)

    def queue(self) -> None:
        """Queues the next turn; the one before it is done."""
        self.turn += 1
        self._queue(self.turn)
        self._done = self._stream.mark()

    def done(self) -> bool:
        """Whether no turn is queued that is not done."""
        return self._done is None or self._done.reached()

    def seconds(self) -> float:
        """Device time of the last turn, without the wait for the other side."""
        assert self._began is not None and self._done is not None
        return self._done.seconds_after(self._began)

    def release(self) -> None:
        """Has a turn that waits for the other side pass, and do nothing."""
        self._stream.release(self._mailbox.heard, bell(self._grant, ENDED))

    @abstractmethod
    def _width(self, steps: int) -> int:
        """Rows of a sequence in a turn."""

    @abstractmethod
    def _place(self, s: int, one: TurnSequence) -> None:
        """Writes the numbers of sequence ``s`` that this side has of its own."""

    @abstractmethod
    def _rehearse(self) -> None:
        """Runs every chain of a turn."""

    def _rehearsed(self) -> set[tuple[int, int]]:
        """The (slots, K) whose chains were run."""
        return {self._sizes()}

    @abstractmethod
    def _queue(self, turn: int) -> None: ...

    def _slots_for(self, count: int, steps: int) -> int:
        """Sequences that a turn of ``count`` is launched for; the others are over."""
        slots = min(bucket(count, SLOTS), self._mailbox.layout.max_sequences)
        return slots if slots * self._width(steps) <= HEAD_ROWS else count

    def _sizes(self) -> tuple[int, int]:
        return self._slots, self._steps

    def _pinned(self, *shape: int) -> Tensor:
        pin = self._parts.device.type == "cuda"
        return torch.zeros(shape, dtype=torch.int32, pin_memory=pin)
