"""The verifier's engine: one forward over all rows of a round, then the acceptance rule."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from outrider.shared.core.errors import RefusalCode
from outrider.shared.core.types import Refusal, Verdict, VerifyItem
from outrider.shared.model.runner import Span
from outrider.shared.rounds.session import Engine, Held, finite_rows, refusal, spans_of
from outrider.verify_service.acceptance import Judged, JudgeItem, judge
from outrider.verify_service.soundness import sound_tokens

log = logging.getLogger(__name__)


class VerifyEngine(Engine[VerifyItem, Verdict]):
    """Judges proposals.

    The rows of an item are ``append + proposal``; the logits of the pending row and of each
    proposal row decide. With ``a`` accepted the valid length becomes ``committed_len - 1``:
    the KV of rejected rows is forgotten by setting that one integer.
    """

    _cut = False
    """Whether a proposal was cut before."""

    def reject(self, item: VerifyItem) -> str | None:
        """See ``Engine.reject``."""
        if item.extend_only:
            return "extend_only goes without a proposal" if item.proposal else None
        if not item.append:
            return "append is empty: the pending token is needed to verify"
        return None

    def sound(self, item: VerifyItem) -> VerifyItem:
        """See ``Engine.sound``: the proposal up to its first token that can't be judged."""
        if not item.proposal or item.extend_only:
            return item
        log_len = item.base_len + len(item.append)
        most = max(0, min(self.max_k, self.runner.places(log_len) - log_len))
        kept, why = sound_tokens(item.proposal, item.rows, self.runner.facts.vocab_size, most)
        if kept == len(item.proposal) and len(item.rows) in (0, kept):
            return item
        # Once: a draft that is wrong is so in every round.
        level, self._cut = logging.DEBUG if self._cut else logging.WARNING, True
        log.log(level, "cut a proposal of %d tokens to %d: %s", len(item.proposal), kept, why)
        return replace(item, proposal=item.proposal[:kept], rows=item.rows[:kept])

    def rows_of(self, item: VerifyItem) -> int:
        """See ``Engine.rows_of``."""
        return len(item.append) + len(item.proposal)

    def tokens_of(self, item: VerifyItem) -> Sequence[int]:
        """See ``Engine.tokens_of``."""
        return item.append + item.proposal if item.proposal else item.append

    def run(self, work: Sequence[tuple[VerifyItem, Held]]) -> tuple[list[Verdict | Refusal], int]:
        """See ``Engine.run``."""
        wanted = [0 if item.extend_only else len(item.proposal) + 1 for item, _ in work]
        spans = spans_of(work, [self.tokens_of(item) for item, _ in work], wanted)
        answers: list[Verdict | Refusal | None] = [None] * len(work)
        if not spans:
            return [_extended(item) for item, _ in work], 0
        judged = [i for i, count in enumerate(wanted) if count]
        quick = self._on_device(work, spans, judged)
        if quick is not None:
            return quick
        logits = self.runner.forward(spans)
        finite = finite_rows(logits) if judged else []
        # One bad sequence must not spoil the batch: its rows are judged and thrown away.
        questions, row, broken = [], 0, set()
        for i in judged:
            item, held = work[i]
            if not all(finite[row : row + wanted[i]]):
                broken.add(i)
            row += wanted[i]
            questions.append(JudgeItem(held.decoding, held.log, item.proposal, item.rows))
        verdicts = judge(logits, questions) if questions else []
        for i, verdict in zip(judged, verdicts, strict=True):
            if i in broken:
                answers[i] = self._not_finite(*work[i])
            elif verdict is None:
                answers[i] = self._refused(
                    *work[i], RefusalCode.NOTHING_ALLOWED, "no token is allowed"
                )
            else:
                answers[i] = _settled(*work[i], verdict)
        return [
            answer if answer is not None else _extended(work[i][0])
            for i, answer in enumerate(answers)
        ], sum(len(span.tokens) for span in spans)

    def _on_device(
        self,
        work: Sequence[tuple[VerifyItem, Held]],
        spans: Sequence[Span],
        judged: Sequence[int],
    ) -> tuple[list[Verdict | Refusal], int] | None:
        """The whole round as one launch, where the runner can; see ``Runner.judge``."""
        if len(judged) != len(work):
            return None
        found = self.runner.judge(
            spans,
            [held.decoding for _, held in work],
            [item.proposal for item, _ in work],
            [item.rows for item, _ in work],
        )
        if found is None:
            return None
        return self._answers(work, found), sum(len(span.tokens) for span in spans)

    def settle(
        self, work: Sequence[tuple[VerifyItem, Held]], found: Sequence[tuple[int, int]]
    ) -> tuple[list[Verdict | Refusal], int]:
        """See ``Engine.settle``; ``found``: as ``Runner.judge`` returns it."""
        spans = spans_of(work, [self.tokens_of(item) for item, _ in work], [0] * len(work))
        self.runner.written(spans)
        return self._answers(work, found), sum(len(span.tokens) for span in spans)

    def _answers(
        self, work: Sequence[tuple[VerifyItem, Held]], found: Sequence[tuple[int, int]]
    ) -> list[Verdict | Refusal]:
        return [
            self._not_finite(item, held)
            if token < 0
            else _settled(item, held, Judged(accepted, token))
            for (item, held), (accepted, token) in zip(work, found, strict=True)
        ]

    def _not_finite(self, item: VerifyItem, held: Held) -> Refusal:
        return self._refused(item, held, RefusalCode.MODEL, "the model's logits are not finite")

    def _refused(self, item: VerifyItem, held: Held, code: RefusalCode, why: str) -> Refusal:
        """Refuses an item that was forwarded; its rows are forgotten."""
        self.runner.arena.distrust(held.extent, item.base_len)
        return refusal(item, code, why)


def _settled(item: VerifyItem, held: Held, judged: Judged) -> Verdict:
    """The verdict; what was rejected is forgotten by setting the valid length."""
    committed, accepted = item.base_len + len(item.append), judged.num_accepted
    held.extent.valid_len = committed + accepted
    held.log.extend(item.proposal[:accepted])
    held.log.append(judged.next_token)
    return Verdict(
        item.sequence_id,
        item.epoch,
        accepted,
        judged.next_token,
        committed + accepted + 1,
        judged.logprobs,
    )


def _extended(item: VerifyItem) -> Verdict:
    """The answer to ``extend_only``: taken in, nothing chosen."""
    return Verdict(item.sequence_id, item.epoch, 0, None, item.base_len + len(item.append))
