"""The verifier's turns on the device, see ``shared/model/cuda/turns``."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from outrider.shared.link.device.mailbox import DeviceLayout, DeviceMailbox, DeviceRegion, bell
from outrider.shared.model.cuda.passes import HEAD_ROWS, MAX_SEQUENCES, POWERS, ROW_SIZES, bucket
from outrider.shared.model.cuda.step import batch_of, signed
from outrider.shared.model.cuda.turns.stream import DeviceStream, Mark
from outrider.shared.model.cuda.turns.turns import SLOTS, Parts, Turns, TurnSequence


class VerifyTurns(Turns):
    """The verifier's turns: take the proposals, forward, judge, settle."""

    def __init__(self, parts: Parts, mailbox: DeviceMailbox, stream: DeviceStream) -> None:
        super().__init__(parts, mailbox, stream)
        device = parts.device
        self._chosen = torch.zeros(HEAD_ROWS, dtype=torch.int32, device=device)
        self._verdicts = torch.zeros(MAX_SEQUENCES, 2, dtype=torch.int32, device=device)
        self._tokens_host, self._verdicts_host = self._pinned(HEAD_ROWS), self._pinned(64, 2)
        self._proposed_host = self._pinned(MAX_SEQUENCES)

    def result(self) -> list[tuple[list[int], int, int]]:
        """Per sequence: what was proposed, how much was accepted, and the base's token (-1: its
        logits were not finite)."""
        width, found = self._steps + 1, []
        tokens, verdicts = self._tokens_host.tolist(), self._verdicts_host.tolist()
        for s, count in enumerate(self._proposed_host[: self._count].tolist()):
            first = s * width + 1
            accepted, token = verdicts[s]
            found.append((tokens[first : first + count], accepted, token))
        return found

    def _width(self, steps: int) -> int:
        return steps + 1

    def _place(self, s: int, one: TurnSequence) -> None:
        host, width = self._inputs.host, self._steps + 1
        rows = slice(s * width, (s + 1) * width)
        host["first_rows"][s] = host["picks"][s] = s * width
        host["temperatures"][rows] = one.decoding.temperature
        host["seeds"][rows] = signed(one.decoding.seed)

    def _rehearse(self) -> None:
        self._stream.run(self._sizes(), self._chain)

    def _queue(self, turn: int) -> None:
        self._stream.wait(self._mailbox.heard, bell(self._grant, turn + 1))
        self._began = self._stream.mark()
        self._stream.run(self._sizes(), self._chain)
        self._stream.write(self._mailbox.rung, bell(self._grant, turn + 1))

    def _chain(self) -> None:
        step, own, box = self._parts.step, self._inputs.device, self._mailbox
        count, width = self._slots, self._steps + 1
        rows, sequences = bucket(count * width, ROW_SIZES), bucket(count, POWERS)
        overlap = step.tuning.overlap
        step.calls["take"](
            bell=box.heard, proposals=box.proposals, committed=own["committed"],
            pending=own["pending"], limits=own["limits"], ks=own["ks"], tokens=own["tokens"],
            positions=own["positions"], noise_positions=own["noise_positions"],
            row_counts=own["row_counts"], proposed=own["proposed"], width=width, count=count,
            overlap=overlap,
        )  # fmt: skip
        step.run(batch_of(own), rows, sequences, bucket(width, POWERS))
        step.choose(
            rows, None, own["temperatures"], own["seeds"], own["noise_positions"], self._chosen
        )
        # The row of the pending token is where a sequence's rows begin.
        step.accept(
            self._chosen, own["tokens"], own["picks"], own["proposed"], self._verdicts[:sequences]
        )
        step.calls["settle"](
            verdicts=self._verdicts, committed=own["committed"], pending=own["pending"],
            row_counts=own["row_counts"], limits=own["limits"], slots=box.verdicts, count=count,
            overlap=overlap,
        )  # fmt: skip
        self._bring_back()

    def _bring_back(self) -> None:
        """Queues what ``result`` reads."""
        self._verdicts_host.copy_(self._verdicts, non_blocking=True)
        self._tokens_host.copy_(self._inputs.device["tokens"], non_blocking=True)
        self._proposed_host.copy_(self._inputs.device["proposed"], non_blocking=True)


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A turn that was queued, and where its verdicts will be."""

    began: Mark
    done: Mark
    verdicts: Tensor


class AloneVerifyTurns(VerifyTurns):
    """The verifier's turns without a draft: nobody is waited for, and nobody told.

    Up to ``MOST_UNDER_WAY`` may be queued, one behind the other; ``take`` takes the first.
    """

    MOST_UNDER_WAY = 2
    _least_k = 0
    _written = 1

    def __init__(self, parts: Parts, mailbox: DeviceMailbox, stream: DeviceStream) -> None:
        super().__init__(parts, mailbox, stream)
        self._rooms = [self._pinned(MAX_SEQUENCES, 2) for _ in range(self.MOST_UNDER_WAY)]
        self._under_way: deque[_UnderWay] = deque()

    @classmethod
    def of(cls, runner: Any) -> AloneVerifyTurns:
        """Turns of a ``CudaRunner``, over a mailbox that nobody else has."""
        layout, device = DeviceLayout(MAX_SEQUENCES, 1), runner.storage.device
        own, other = (
            DeviceRegion(torch.zeros(layout.size, dtype=torch.uint8, device=device), layout)
            for _ in range(2)
        )
        made: AloneVerifyTurns = runner.turns(cls, DeviceMailbox(own, other, "verify"))
        return made

    def sizes_ahead(self) -> list[tuple[int, int]]:
        """See ``Turns.sizes_ahead``; nothing is proposed."""
        return [(slots, 0) for slots in SLOTS]

    @property
    def under_way(self) -> int:
        """Turns that were queued and not taken."""
        return len(self._under_way)

    def queue(self) -> None:
        """Queues the next turn; there is room for it."""
        self.turn += 1
        began = self._stream.mark()
        self._queue(self.turn)
        done = self._stream.mark()
        self._under_way.append(_UnderWay(began, done, self._room(self.turn)))

    def take(self) -> tuple[list[tuple[int, int]], float]:
        """Waits for the first turn under way: accepted (none) and the base's token of each
        sequence, -1 where its logits were not finite; and the turn's device time in seconds."""
        turn = self._under_way.popleft()
        turn.done.wait()
        found = [(accepted, token) for accepted, token in turn.verdicts[: self._count].tolist()]
        return found, turn.done.seconds_after(turn.began)

    def drop(self) -> None:
        """Waits until no turn is under way; nobody asks for what they found."""
        while self._under_way:
            self._under_way.popleft().done.wait()

    def _rehearse(self) -> None:
        super()._rehearse()
        for turn in range(self.MOST_UNDER_WAY):
            self._leave(turn)

    def _queue(self, turn: int) -> None:
        self._stream.run(self._sizes(), self._chain)
        self._leave(turn)

    def _leave(self, turn: int) -> None:
        """Queues that the verdicts are copied to where they are read."""
        room = self._room(turn)

        def bring_back() -> None:
            room.copy_(self._verdicts, non_blocking=True)

        self._stream.run(turn % self.MOST_UNDER_WAY, bring_back)

    def _room(self, turn: int) -> Tensor:
        return self._rooms[turn % self.MOST_UNDER_WAY]

    def _bring_back(self) -> None:
        pass  # the next turn may be done before this one's verdicts are read: each has its room
