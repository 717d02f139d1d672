"""The draft's engine: take in what was committed, then propose K tokens one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.draft_service.proposing import ProposingEngine
from outrider.shared.core.errors import RefusalCode
from outrider.shared.core.types import OpenSequence, Proposal, ProposeItem, Refusal, SparseRow
from outrider.shared.model.runner import Runner, Span
from outrider.shared.rounds.session import Held, finite_rows, refusal, spans_of
from outrider.shared.sampling.choose import RowContext, choice_noise, propose

# Numbers drawn ahead at most, per round: beyond this the memory costs more than the calls.
_NOISE_AHEAD = 1 << 22


@dataclass(frozen=True, slots=True)
class _Noise:
    """Rows of noise [places, vocab], and which row is for which (item, step)."""

    values: Tensor
    row: dict[tuple[int, int], int]

    def of(self, places: Sequence[tuple[int, int]]) -> Tensor:
        """The rows of ``places``, in order."""
        return self.values[[self.row[place] for place in places]]


class DraftEngine(ProposingEngine):
    """Proposes tokens.

    The first forward takes ``append`` in (after full acceptance that is the last proposed token
    and the bonus token: two rows, not two forwards) and gives the first proposed token; each
    further forward takes in one proposed token. The last one's KV is not written, so
    afterwards ``valid_len = committed_len + K - 1``.
    """

    runner: Runner

    @property
    def trial_amounts(self) -> tuple[int, ...]:
        """See ``Engine.trial_amounts``."""
        return tuple(k for k in (1, 4, 8, 2) if k <= self.max_k)

    def trial(
        self, opened: OpenSequence, base_len: int, tokens: Sequence[int], amount: int
    ) -> ProposeItem:
        """See ``Engine.trial``."""
        append = tuple(tokens[:1] if amount else tokens)
        return ProposeItem(opened.sequence_id, opened.epoch, base_len, append, amount)

    def _noise(self, work: Sequence[tuple[ProposeItem, Held]], ks: Sequence[int]) -> _Noise | None:
        """The noise of all positions of the round, drawn at once: it depends on no token."""
        vocab = self.runner.facts.vocab_size
        if sum(ks) < 2 or sum(ks) * vocab > _NOISE_AHEAD:
            return None
        places = [(i, j) for i, k in enumerate(ks) for j in range(k)]
        noise = choice_noise(
            [work[i][1].decoding for i, _ in places],
            [len(work[i][1].log) + j for i, j in places],
            vocab,
            self.runner.storage.device,
        )
        return None if noise is None else _Noise(noise, {p: row for row, p in enumerate(places)})

    @torch.inference_mode()
    def run(self, work: Sequence[tuple[ProposeItem, Held]]) -> tuple[list[Proposal | Refusal], int]:
        """See ``Engine.run``."""
        ks = [self._clipped(item) for item, _ in work]
        counts = [min(k, 1) for k in ks]
        spans = spans_of(work, [item.append for item, _ in work], counts)
        quick = self._on_device(work, spans, ks)
        if quick is not None:
            return quick
        rows = sum(len(span.tokens) for span in spans)
        chosen: list[list[int]] = [[] for _ in work]
        weights: list[list[SparseRow]] = [[] for _ in work]
        failed: set[int] = set()
        stuck: set[int] = set()  # nothing is allowed there, which the base will find too
        # The log grows by the proposed tokens, which the choice of the next one looks at; the
        # next item's base_len cuts them off again.
        active = [i for i, k in enumerate(ks) if k > 0]
        noise = self._noise(work, ks)
        while spans:
            logits = self.runner.forward(spans)
            if active:
                contexts = [RowContext(work[i][1].decoding, work[i][1].log) for i in active]
                finite = finite_rows(logits)
                ahead = None if noise is None else noise.of([(i, len(chosen[i])) for i in active])
                tokens, row_weights = propose(logits, contexts, ahead)
                for i, fine, token, weight in zip(active, finite, tokens, row_weights, strict=True):
                    if not fine:
                        failed.add(i)
                        continue
                    if token < 0:
                        stuck.add(i)
                        continue
                    chosen[i].append(token)
                    work[i][1].log.append(token)
                    if weight is not None:
                        weights[i].append(weight)
            active = [i for i in active if i not in failed | stuck and len(chosen[i]) < ks[i]]
            spans = spans_of(
                [work[i] for i in active], [chosen[i][-1:] for i in active], [1] * len(active)
            )
            rows += len(spans)
        return self._answers(work, chosen, weights, failed), rows

    def _on_device(
        self, work: Sequence[tuple[ProposeItem, Held]], spans: Sequence[Span], ks: Sequence[int]
    ) -> tuple[list[Proposal | Refusal], int] | None:
        """The whole round as one launch, where the runner can; see ``Runner.propose``."""
        if len(spans) != len(work):
            return None
        found = self.runner.propose(spans, [held.decoding for _, held in work], ks)
        if found is None:
            return None
        rows = sum(len(span.tokens) for span in spans) + sum(max(k - 1, 0) for k in ks)
        return self._noted(work, found), rows

    def settle(
        self, work: Sequence[tuple[ProposeItem, Held]], found: Sequence[Sequence[int]]
    ) -> tuple[list[Proposal | Refusal], int]:
        """See ``Engine.settle``; ``found``: as ``Runner.propose`` returns it."""
        rows = [(*item.append, *tokens[:-1]) for (item, _), tokens in zip(work, found, strict=True)]
        self.runner.written(spans_of(work, rows, [0] * len(work)))
        return self._noted(work, found), sum(map(len, rows))

    def _noted(
        self, work: Sequence[tuple[ProposeItem, Held]], found: Sequence[Sequence[int]]
    ) -> list[Proposal | Refusal]:
        """Takes what the device chose into the logs."""
        failed = {i for i, tokens in enumerate(found) if -1 in tokens}
        for i, (_, held) in enumerate(work):
            if i not in failed:
                held.log.extend(found[i])
        return self._answers(work, found, [[] for _ in work], failed)

    def _answers(
        self,
        work: Sequence[tuple[ProposeItem, Held]],
        chosen: Sequence[Sequence[int]],
        weights: Sequence[Sequence[SparseRow]],
        failed: set[int],
    ) -> list[Proposal | Refusal]:
        for i in failed:
            item, held = work[i]
            self.runner.arena.distrust(held.extent, item.base_len)
        return [
            refusal(item, RefusalCode.MODEL, "the model's logits are not finite")
            if i in failed
            else Proposal(
                item.sequence_id,
                item.epoch,
                item.base_len + len(item.append),
                tuple(chosen[i]),
                tuple(weights[i]),
            )
            for i, (item, _) in enumerate(work)
        ]
