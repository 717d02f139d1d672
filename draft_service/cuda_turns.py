"""The draft's turns on the device, see ``shared/model/cuda/turns``."""

from __future__ import annotations

from functools import partial

import torch

from outrider.shared.link.device.mailbox import DeviceMailbox, bell
from outrider.shared.model.cuda.passes import HEAD_ROWS, MAX_SEQUENCES, POWERS, ROW_SIZES, bucket
from outrider.shared.model.cuda.step import draft_step, signed
from outrider.shared.model.cuda.turns.stream import DeviceStream
from outrider.shared.model.cuda.turns.turns import Parts, Turns, TurnSequence
from outrider.shared.rounds.grants import next_k

ROWS = 2
"""Rows of a sequence in a turn: the last two tokens of its log."""


class DraftTurns(Turns):
    """The draft's turns: follow the verdicts, then propose."""

    def __init__(self, parts: Parts, mailbox: DeviceMailbox, stream: DeviceStream) -> None:
        super().__init__(parts, mailbox, stream)
        device, steps = parts.device, max(parts.max_k, 1)
        self._iota = torch.arange(MAX_SEQUENCES, dtype=torch.int32, device=device)
        self._chosen = torch.zeros(steps, HEAD_ROWS, dtype=torch.int32, device=device)
        self._seen = torch.zeros_like(mailbox.verdicts)
        self._chosen_host = self._pinned(steps, HEAD_ROWS)
        self._seen_host = self._pinned(*mailbox.verdicts.shape)

    def result(self) -> list[list[int]]:
        """Per sequence what was proposed, K tokens whether they are all wanted or not."""
        return self._chosen_host[: self._steps, : self._count].T.tolist()

    def verdicts(self) -> list[tuple[int, int, int, int]]:
        """Per sequence the verdict that the last turn began with, see ``DeviceMailbox``."""
        return [tuple(row) for row in self._seen_host[: self._count].tolist()]

    def _width(self, steps: int) -> int:
        return ROWS

    def _place(self, s: int, one: TurnSequence) -> None:
        host, n = self._inputs.host, one.committed_len
        host["tokens"][2 * s : 2 * s + 2] = one.before, one.pending
        host["first_rows"][s], host["row_counts"][s], host["picks"][s] = 2 * s, 2, 2 * s + 1
        host["positions"][s], host["noise_positions"][s] = n - 2, n
        host["temperatures"][s] = one.decoding.temperature
        host["seeds"][s] = signed(one.decoding.seed)
        host["active"][: next_k(one.k, one.limit, n), s] = 1

    def _rehearse(self) -> None:
        self._follow()
        self._propose()

    def _rehearsed(self) -> set[tuple[int, int]]:
        # Each token is a chain of its own: those of fewer are among them.
        return {(self._slots, k) for k in range(1, self._steps + 1)}

    def _queue(self, turn: int) -> None:
        if turn:
            self._stream.wait(self._mailbox.heard, bell(self._grant, turn))
        self._began = self._stream.mark()
        if turn:
            self._follow()
        self._propose()
        self._stream.write(self._mailbox.rung, bell(self._grant, turn + 1))

    def _follow(self) -> None:
        """From the verdicts to the rows of the first forward."""
        step, own, box = self._parts.step, self._inputs.device, self._mailbox

        def chain() -> None:
            step.calls["follow"](
                bell=box.heard, slots=box.verdicts, chosen=self._chosen,
                pending=own["pending"], ks=own["ks"], limits=own["limits"], tokens=own["tokens"],
                positions=own["positions"], noise_positions=own["noise_positions"],
                row_counts=own["row_counts"], active=own["active"], seen=self._seen,
                count=self._slots, overlap=step.tuning.overlap,
            )  # fmt: skip
            self._seen_host.copy_(self._seen, non_blocking=True)

        self._stream.run(("follow", self._slots), chain)

    def _propose(self) -> None:
        """One token after the other, and what the verifier is to have of them."""
        own, box, slots = self._inputs.device, self._mailbox, self._slots
        size = bucket(2 * slots, ROW_SIZES), bucket(slots, POWERS), 2

        def token(j: int) -> None:
            step = self._parts.step
            draft_step(step, own, size, own["picks"], self._iota, self._chosen, j)

        for j in range(self._steps):
            self._stream.run(("token", slots, j), partial(token, j))

        def tell() -> None:
            steps = min(box.layout.max_k, self._chosen.shape[0])
            box.proposals[:slots, :steps].copy_(self._chosen[:steps, :slots].T)
            self._chosen_host.copy_(self._chosen, non_blocking=True)

        self._stream.run(("tell", slots), tell)
