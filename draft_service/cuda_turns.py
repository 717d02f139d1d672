"""The draft's turns on the device, see ``shared/model/cuda/turns``."""

from __future__ import annotations

import torch

from outrider.shared.link.device.mailbox import DeviceMailbox, bell
from outrider.shared.model.cuda.passes import HEAD_ROWS, MAX_SEQUENCES, POWERS, ROW_SIZES, bucket
from outrider.shared.model.cuda.step import draft, signed
from outrider.shared.model.cuda.turns.stream import DeviceStream
from outrider.shared.model.cuda.turns.turns import Parts, Turns, TurnSequence
from outrider.shared.rounds.grants import next_k


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
        return 2

    def _place(self, s: int, one: TurnSequence) -> None:
        host, n = self._inputs.host, one.committed_len
        host["tokens"][2 * s : 2 * s + 2] = one.before, one.pending
        host["first_rows"][s], host["row_counts"][s], host["picks"][s] = 2 * s, 2, 2 * s + 1
        host["positions"][s], host["noise_positions"][s] = n - 2, n
        host["temperatures"][s] = one.decoding.temperature
        host["seeds"][s] = signed(one.decoding.seed)
        host["active"][: next_k(one.k, one.limit, n), s] = 1

    def _rehearse(self) -> None:
        for first in (True, False):
            self._run(first)

    def _queue(self, turn: int) -> None:
        if turn:
            self._stream.wait(self._mailbox.heard, bell(self._grant, turn))
        self._began = self._stream.mark()
        self._run(turn == 0)
        self._stream.write(self._mailbox.rung, bell(self._grant, turn + 1))

    def _run(self, first: bool) -> None:
        self._stream.run((*self._sizes(), first), lambda: self._chain(first))

    def _chain(self, first: bool) -> None:
        step, own, box = self._parts.step, self._inputs.device, self._mailbox
        count, steps = self._slots, self._steps
        if not first:
            step.calls["follow"](
                bell=box.heard, slots=box.verdicts, chosen=self._chosen,
                pending=own["pending"], ks=own["ks"], limits=own["limits"], tokens=own["tokens"],
                positions=own["positions"], noise_positions=own["noise_positions"],
                row_counts=own["row_counts"], active=own["active"], seen=self._seen, count=count,
                overlap=step.tuning.overlap,
            )  # fmt: skip
            self._seen_host.copy_(self._seen, non_blocking=True)
        sequences = bucket(count, POWERS)
        size = bucket(2 * count, ROW_SIZES), sequences, 2
        draft(step, own, size, own["picks"], self._iota, self._chosen, steps)
        box.proposals[:count, :steps].copy_(self._chosen[:steps, :count].T)
        self._chosen_host.copy_(self._chosen, non_blocking=True)
