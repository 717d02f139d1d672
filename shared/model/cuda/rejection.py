"""Verdicts of the rule ``rejection`` on the device: the draft's distributions on their way to the
kernel ``reject``, in a buffer of their own, so that rounds without them carry nothing of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from outrider.kernels.reject import ENTRIES
from outrider.shared.core.rules import REJECTION
from outrider.shared.core.types import Decoding, SparseRow
from outrider.shared.model.cuda.forward import Forward
from outrider.shared.model.cuda.inputs import Field, Inputs
from outrider.shared.model.cuda.passes import HEAD_ROWS, MAX_SEQUENCES

_NOBODY = -1


def draws(decoding: Decoding, proposal: Sequence[int]) -> bool:
    """Whether the proposal is judged by rejection; without one the base just chooses."""
    return bool(proposal) and decoding.rule.judge == REJECTION.judge


def fits(rows: Sequence[Sequence[SparseRow]]) -> bool:
    """Whether the buffer has room for distributions of these sizes."""
    return all(len(row.ids) <= ENTRIES for own in rows for row in own)


class Draws:
    """What the device needs to judge by rejection, besides what every round brings."""

    def __init__(self, device: torch.device) -> None:
        """The buffer has room for ``ENTRIES`` entries at each of HEAD_ROWS rows."""
        self._inputs = Inputs(
            [
                Field("ids", (HEAD_ROWS, ENTRIES)),
                Field("offered", (HEAD_ROWS, ENTRIES), "f"),
                Field("counts", (HEAD_ROWS,)),
                Field("proposed", (MAX_SEQUENCES,)),
            ],
            device,
        )

    def begin(self) -> None:
        """Nobody is judged by rejection yet; the copy of the round before is done."""
        self._inputs.host["counts"][:] = _NOBODY
        self._inputs.host["proposed"][:] = _NOBODY

    def place(
        self, s: int, pending: int, proposal: Sequence[int], rows: Sequence[SparseRow]
    ) -> None:
        """Writes what belongs to sequence ``s``, whose pending token is in row ``pending``.

        ``rows``: the distributions that the proposal was drawn from, or none: then each token
        counts as certain.
        """
        host = self._inputs.host
        host["proposed"][s] = len(proposal)
        for i, token in enumerate(proposal):
            row = rows[i] if rows else SparseRow((token,), (1.0,))
            at, count = pending + i, len(row.ids)
            host["ids"][at, :count] = row.ids
            host["offered"][at, :count] = row.probabilities
            host["counts"][at] = count
        host["counts"][pending + len(proposal)] = 0

    def upload(self) -> None:
        """Copies everything to the device, in stream order."""
        self._inputs.upload()

    def run(self, step: Forward, count: int, own: dict[str, Tensor], verdicts: Tensor) -> None:
        """verdicts[s] of the sequences that were placed; the others' are left as they are.

        ``count``: rows of the forward; ``own``: the numbers that every round brings, by name.
        """
        held, sequences = self._inputs.device, verdicts.shape[0]
        step.calls["reject"](
            logits=step.logits,
            temperatures=own["temperatures"],
            seeds=own["seeds"],
            positions=own["noise_positions"],
            tokens=own["judged"],
            counts=held["counts"],
            ids=held["ids"],
            offered=held["offered"],
            pending=own["pending"][:sequences],
            proposed=held["proposed"][:sequences],
            verdicts=verdicts,
            count=count,
            overlap=step.tuning.overlap,
        )
