"""The verifier's engine: one forward over all rows of a round, then the acceptance rule."""

from __future__ import annotations

from collections.abc import Sequence

from outrider.shared.errors import RefusalCode
from outrider.shared.sequences import Engine, Held, finite_rows, refusal, spans_of
from outrider.shared.types import Refusal, Verdict, VerifyItem
from outrider.verify_service.acceptance import JudgeItem, judge, malformed


class VerifyEngine(Engine[VerifyItem, Verdict]):
    """Judges proposals.

    The rows of an item are ``append + proposal``; the logits of the pending row and of each
    proposal row decide. With ``a`` accepted the valid length becomes ``committed_len - 1``:
    the KV of rejected rows is forgotten by setting that one integer.
    """

    def reject(self, item: VerifyItem) -> str | None:
        """See ``Engine.reject``."""
        if len(item.proposal) > self.max_k:
            return f"proposal: got {len(item.proposal)} tokens; at most {self.max_k} are allowed"
        if item.extend_only:
            return "extend_only goes without a proposal" if item.proposal else None
        if not item.append:
            return "append is empty: the pending token is needed to verify"
        return malformed(item.proposal, item.rows, self.runner.facts.vocab_size)

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
        logits = self.runner.forward(spans)
        judged = [i for i, count in enumerate(wanted) if count]
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
            item, held = work[i]
            committed = item.base_len + len(item.append)
            if i in broken:
                self.runner.arena.distrust(held.extent, item.base_len)
                answers[i] = refusal(item, RefusalCode.MODEL, "the model's logits are not finite")
                continue
            accepted = verdict.num_accepted
            held.extent.valid_len = committed + accepted
            held.log.extend(item.proposal[:accepted])
            held.log.append(verdict.next_token)
            answers[i] = Verdict(
                item.sequence_id,
                item.epoch,
                accepted,
                verdict.next_token,
                committed + accepted + 1,
                verdict.logprobs,
            )
        return [
            answer if answer is not None else _extended(work[i][0])
            for i, answer in enumerate(answers)
        ], sum(len(span.tokens) for span in spans)


def _extended(item: VerifyItem) -> Verdict:
    """The answer to ``extend_only``: taken in, nothing chosen."""
    return Verdict(item.sequence_id, item.epoch, 0, None, item.base_len + len(item.append))
