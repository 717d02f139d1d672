"""The verifier's engine: one forward over all rows of a round, then the acceptance rule."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from outrider.shared.core.errors import RefusalCode
from outrider.shared.core.types import OpenSequence, Refusal, Verdict, VerifyItem
from outrider.shared.model.runner import Runner, Span
from outrider.shared.rounds.session import Engine, Held, Session, finite_rows, refusal, spans_of
from outrider.verify_service.acceptance import Judged, JudgeItem, judge
from outrider.verify_service.soundness import sound_tokens

log = logging.getLogger(__name__)


class VerifyEngine(Engine[VerifyItem, Verdict]):
    """Judges proposals.

    The rows of an item are ``append + proposal``; the logits of the pending row and of each
    proposal row decide. With ``a`` accepted the valid length becomes ``committed_len - 1``:
    the KV of rejected rows is forgotten by setting that one integer.
    """

    runner: Runner

    _cut = False
    """Whether a proposal was cut before."""

    @property
    def trial_amounts(self) -> tuple[int, ...]:
        """See ``Engine.trial_amounts``."""
        return tuple(rows for rows in (1, 5, 2, 9, 3, 7, 4) if rows <= self.max_k + 1)

    def trial(
        self, opened: OpenSequence, base_len: int, tokens: Sequence[int], amount: int
    ) -> VerifyItem:
        """See ``Engine.trial``."""
        if not amount:
            return VerifyItem(
                opened.sequence_id, opened.epoch, base_len, tuple(tokens), extend_only=True
            )
        pending, proposal = (tokens[0],), tuple(tokens[1:amount])
        return VerifyItem(opened.sequence_id, opened.epoch, base_len, pending, proposal)

    def trial_alone(
        self, session: Session[VerifyItem, Verdict], items: Sequence[VerifyItem]
    ) -> float | None:
        """See ``Engine.trial_alone``: the device takes the turns without a draft where it can."""
        if not hasattr(self.runner, "turns") or any(
            item.extend_only or item.proposal for item in items
        ):
            return None
        # Imported here: most runners have no such turns.
        from outrider.verify_service.alone_rounds import trial

        return trial(session, items)

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

    @torch.inference_mode()
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
        questions = [_question(*work[i]) for i in judged]
        verdicts = judge(logits, questions, finite) if questions else []
        row, again = 0, []
        for i, verdict in zip(judged, verdicts, strict=True):
            if verdict is None and not finite[row] and work[i][0].proposal:
                again.append(i)
            else:
                answers[i] = self._answer(*work[i], verdict, finite[row])
            row += wanted[i]
        for i, answer in zip(again, self._unspoilt([work[i] for i in again]), strict=True):
            answers[i] = answer
        return [
            answer if answer is not None else _extended(work[i][0])
            for i, answer in enumerate(answers)
        ], sum(len(span.tokens) for span in spans)

    def _unspoilt(self, work: Sequence[tuple[VerifyItem, Held]]) -> list[Verdict | Refusal]:
        """Judges anew where not even the pending row was finite, on that row alone.

        Attention gives what a row must not see the weight 0, and 0 times NaN is NaN: a proposed
        token may spoil the rows before it, and their KV with them. The text must not depend on
        what was proposed, so only the pending row's own logits can end it.
        """
        answers: list[Verdict | Refusal | None] = [None] * len(work)
        tokens: list[Sequence[int]] = []
        limit, arena = self.runner.arena.max_rows, self.runner.arena
        for i, (item, held) in enumerate(work):
            # Rings keep what came before the rows of the last pass, and no earlier pass had any
            # of the proposal.
            end = item.base_len + self.rows_of(item)
            begin = item.base_len if limit is None else max(item.base_len, end - limit)
            if not arena.rollback(held.extent, begin):
                answers[i] = self._not_finite(item, held)
            tokens.append(() if answers[i] else item.append[begin - item.base_len :])
        spans = spans_of(work, tokens, [1] * len(work))
        if spans:
            logits = self.runner.forward(spans)
            left = [i for i, answer in enumerate(answers) if answer is None]
            finite = finite_rows(logits)
            counts = [len(work[i][0].proposal) + 1 for i in left]
            # The proposal's own rows count as not finite: they only have to be there.
            rows = logits.repeat_interleave(torch.tensor(counts, device=logits.device), 0)
            sound = [own and not j for own, n in zip(finite, counts, strict=True) for j in range(n)]
            verdicts = judge(rows, [_question(*work[i]) for i in left], sound)
            for i, verdict, own in zip(left, verdicts, finite, strict=True):
                answers[i] = self._answer(*work[i], verdict, own)
        return [answer for answer in answers if answer is not None]

    def _answer(
        self, item: VerifyItem, held: Held, verdict: Judged | None, finite: bool
    ) -> Verdict | Refusal:
        """``verdict``: None where no token can follow the log; ``finite``: its pending row."""
        if verdict is not None:
            return _settled(item, held, verdict)
        if not finite:
            return self._not_finite(item, held)
        return self._refused(item, held, RefusalCode.NOTHING_ALLOWED, "no token is allowed")

    def _on_device(
        self,
        work: Sequence[tuple[VerifyItem, Held]],
        spans: Sequence[Span],
        judged: Sequence[int],
    ) -> tuple[list[Verdict | Refusal], int] | None:
        """The whole round as one launch, where the runner can; see ``Runner.judge``."""
        if not judged or len(spans) != len(work):
            return None
        found = self.runner.judge(
            spans,
            [held.decoding for _, held in work],
            [item.proposal for item, _ in work],
            [item.rows for item, _ in work],
        )
        if found is None:
            return None
        pairs = dict(zip(judged, found, strict=True))
        # What is found at the pending row says nothing beside the rows of a proposal.
        again = [i for i, pair in pairs.items() if pair == (0, -1) and work[i][0].proposal]
        told = dict(zip(again, self._unspoilt([work[i] for i in again]), strict=True))
        told |= {i: self._told(*work[i], *pair) for i, pair in pairs.items() if i not in told}
        answers = [told.get(i) or _extended(item) for i, (item, _) in enumerate(work)]
        return answers, sum(len(span.tokens) for span in spans)

    def settle(
        self, work: Sequence[tuple[VerifyItem, Held]], found: Sequence[tuple[int, int]]
    ) -> tuple[list[Verdict | Refusal], int]:
        """See ``Engine.settle``; ``found``: as ``Runner.judge`` returns it."""
        spans = spans_of(work, [self.tokens_of(item) for item, _ in work], [0] * len(work))
        self.runner.written(spans)
        answers = [self._told(*one, *pair) for one, pair in zip(work, found, strict=True)]
        return answers, sum(len(span.tokens) for span in spans)

    def _told(self, item: VerifyItem, held: Held, accepted: int, token: int) -> Verdict | Refusal:
        """The answer to what the device found; see ``Runner.judge``."""
        if token < 0 < accepted:  # what stands before a row that is not finite
            accepted, token = accepted - 1, item.proposal[accepted - 1]
        if token < 0:
            return self._not_finite(item, held)
        return _settled(item, held, Judged(accepted, token))

    def _not_finite(self, item: VerifyItem, held: Held) -> Refusal:
        return self._refused(item, held, RefusalCode.MODEL, "the model's logits are not finite")

    def _refused(self, item: VerifyItem, held: Held, code: RefusalCode, why: str) -> Refusal:
        """Refuses an item that was forwarded; its rows are forgotten."""
        self.runner.arena.distrust(held.extent, item.base_len)
        return refusal(item, code, why)


def _question(item: VerifyItem, held: Held) -> JudgeItem:
    return JudgeItem(held.decoding, held.log, item.proposal, item.rows)


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
