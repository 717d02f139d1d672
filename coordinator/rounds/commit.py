"""COMMIT: what the verdicts of a round do to logs, statistics and the choice of K."""

from __future__ import annotations

from dataclasses import dataclass, field

from outrider.coordinator.requests.sequence import Sequence
from outrider.coordinator.rounds.controller.choose_k import Speculation
from outrider.coordinator.rounds.drafting import Drafting
from outrider.coordinator.rounds.prompt_budget import PromptBudget
from outrider.coordinator.rounds.recording import DoneRound
from outrider.coordinator.rounds.verifying import Verdicts, VerifyAsked
from outrider.coordinator.telemetry.records import WallClock
from outrider.protos import generation_pb2 as public
from outrider.protos import speculation_pb2 as pb
from outrider.shared.core.errors import OutriderError
from outrider.shared.core.types import PositionLogprobs

ACCEPTED = public.TOKEN_ORIGIN_ACCEPTED
CORRECTED = public.TOKEN_ORIGIN_CORRECTED
BONUS = public.TOKEN_ORIGIN_BONUS
BASE = public.TOKEN_ORIGIN_BASE


@dataclass(slots=True)
class Outcome:
    """What a round leaves for the loop to do."""

    finished: list[Sequence] = field(default_factory=list)
    full: list[Sequence] = field(default_factory=list)
    failed: list[tuple[Sequence, OutriderError]] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    """Served for the first time: the services hold their extents."""
    progressed: bool = False
    lost: bool = False


class Commit:
    """Takes verdicts in, and learns from them."""

    def __init__(
        self,
        drafting: Drafting,
        speculation: Speculation,
        budget: PromptBudget,
        clock: WallClock,
    ) -> None:
        """``budget``: of the prompts that the verifier takes in."""
        self._drafting = drafting
        self._speculation = speculation
        self._budget = budget
        self._clock = clock
        self._before: DoneRound | None = None
        """The round that was learnt from last."""

    def apply(self, verdicts: Verdicts, started_ns: int) -> Outcome:
        """Appends what a round that began at ``started_ns`` has decided to the logs."""
        outcome = Outcome(full=verdicts.full, failed=verdicts.failed, lost=verdicts.lost)
        for asked, verdict in verdicts.given:
            self._append(outcome, asked, verdict, started_ns)
        return outcome

    def account(self, done: DoneRound) -> None:
        """Notes what the round took: for each sample, and for the prompts of the next one."""
        draft, verify = done.proposals.timing, done.verdicts.timing
        if not (done.verdicts.lost or done.verdicts.refusals):
            prompt_rows = sum(rows for _, rows in done.plan.prefill)
            self._budget.observe(prompt_rows, verify.model_seconds)
        for asked, verdict in done.verdicts.given:
            statistics = asked.sequence.statistics
            # The round that wrote the first token belongs to the prefill phase.
            if verdict.HasField("next_token") and statistics.rounds > 1:
                statistics.spent(done.seconds, draft.model_seconds, verify.model_seconds)

    def learn(self, done: DoneRound) -> None:
        """Tells the controller how the proposals fared, and what the round took where that says
        something of decoding."""
        plan, proposals, verdicts = done.plan, done.proposals, done.verdicts
        before, self._before = self._before, done
        ks = {seq.sequence_id: k for seq, k in zip(plan.decode, done.ks, strict=True) if k}
        for asked, verdict in verdicts.given:
            seq, accepted = asked.sequence, verdict.num_accepted
            k = ks.get(seq.sequence_id)
            if k and proposals.timing.sent_ns:
                # A draft that had fewer tokens to propose was of no more use than one that was
                # wrong there; but nobody wants any beyond the end.
                room = seq.output.left + accepted
                wanted = max(len(asked.proposed), min(k, room))
                seq.acceptance.observe(wanted, accepted, seq.output.emitted)
        if plan.prefill or verdicts.lost or not plan.decode or not proposals.clean:
            return
        if ks and not proposals.by_id:
            return  # a draft that had nothing: neither a round with proposals nor one without
        kind = (
            len(plan.decode),
            len(proposals.by_id),
            max((len(one.tokens) for one in proposals.by_id.values()), default=0),
            verdicts.timing.rows,
        )
        if done.begins and before is not None and _goes_on(before, done):
            self._speculation.observe_change(*kind, (done.finished_ns - before.finished_ns) / 1e9)
        drafting = proposals.timing.seconds
        self._speculation.observe(
            *kind, drafting, max(done.seconds - drafting, verdicts.timing.seconds)
        )

    def _append(
        self, outcome: Outcome, asked: VerifyAsked, verdict: pb.Verdict, started_ns: int
    ) -> None:
        seq = asked.sequence
        outcome.progressed = True
        if not seq.statistics.admitted_ns:
            # The previous round's end may be before it arrived.
            seq.statistics.admitted_ns = max(started_ns, seq.statistics.arrived_ns)
            outcome.admitted.append(seq)
        if not verdict.HasField("next_token") or seq.output.finish is not None:
            return
        accepted = verdict.num_accepted
        proposed = len(asked.proposed)
        tokens = [*asked.proposed[:accepted], verdict.next_token]
        if proposed:
            origins = [ACCEPTED] * accepted
            origins.append(BONUS if accepted == proposed else CORRECTED)
            self._drafting.settle(seq, asked.n, proposed, accepted)
        else:
            origins = [BASE]
        seq.log.extend(tokens)
        statistics = seq.statistics
        if not statistics.first_token_ns:
            statistics.first_token_ns = self._clock()
        statistics.verified(proposed, accepted)
        logprobs = [_logprobs(one) for one in verdict.logprobs] if verdict.logprobs else ()
        finish = seq.output.push(tokens, origins, logprobs)
        statistics.emitted = seq.output.emitted
        if finish is not None:
            outcome.finished.append(seq)


def _goes_on(before: DoneRound, done: DoneRound) -> bool:
    """Whether some that ``done`` decoded for were decoded for in the round before: then there was
    no pause between the two."""
    return not set(before.plan.decode).isdisjoint(done.plan.decode)


def _logprobs(message: pb.PositionLogprobs) -> PositionLogprobs:
    return PositionLogprobs(
        message.logprob, tuple(zip(message.top_ids, message.top_logprobs, strict=True))
    )
