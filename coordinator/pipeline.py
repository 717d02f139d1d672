"""One round, end to end: SPECULATE, VERIFY, COMMIT.

    choose K  ->  ask the draft  ->  ask the verifier  ->  append to the logs
                                          |
                                          +-- while it works: hand out text and records,
                                              let the draft catch up

A round in which no sequence has a proposal skips the draft. Sequences whose prompt is being
taken in go to both services side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from outrider.coordinator.drafting import Drafting, Proposals
from outrider.coordinator.records import Observer, RoundRecord, SequenceRound, WallClock
from outrider.coordinator.scheduler import Plan
from outrider.coordinator.sequence import Sequence
from outrider.coordinator.speculation import Lane, Speculation
from outrider.coordinator.verifying import Asked, Judged, Verifying
from outrider.protos import generation_pb2 as public
from outrider.protos import speculation_pb2 as pb
from outrider.shared.errors import OutriderError
from outrider.shared.types import PositionLogprobs

ACCEPTED = public.TOKEN_ORIGIN_ACCEPTED
CORRECTED = public.TOKEN_ORIGIN_CORRECTED
BONUS = public.TOKEN_ORIGIN_BONUS
BASE = public.TOKEN_ORIGIN_BASE


@dataclass(slots=True)
class Outcome:
    """What a round leaves for the driver to do."""

    finished: list[Sequence] = field(default_factory=list)
    full: list[Sequence] = field(default_factory=list)
    failed: list[tuple[Sequence, OutriderError]] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    """Served for the first time: the services hold their extents."""
    progressed: bool = False
    lost: bool = False


class Pipeline:
    """Runs rounds over the two services."""

    def __init__(
        self,
        drafting: Drafting,
        verifying: Verifying,
        speculation: Speculation,
        *,
        observer: Observer,
        clock: WallClock,
        records: Callable[[RoundRecord], None],
    ) -> None:
        """``records`` takes the record of each round; it is to hand it on later."""
        self._drafting = drafting
        self._verifying = verifying
        self._speculation = speculation
        self._observer = observer
        self._clock = clock
        self._records = records
        self._round = 0

    async def round(
        self, plan: Plan[Sequence], started_ns: int, meanwhile: Callable[[], None], waiting: int
    ) -> Outcome:
        """Runs one round; ``meanwhile`` is called once, while the verifier works."""
        self._round += 1
        traceparent = ""
        if self._observer.enabled:
            traceparent = self._observer.traceparent(self._round, _request_ids(plan))
        # SPECULATE
        ks = self._choose(plan.decode)
        wanted = [(seq, k) for seq, k in zip(plan.decode, ks, strict=True) if k > 0]
        proposals = Proposals()
        if wanted:
            proposals = await self._drafting.propose(wanted, traceparent)

        # VERIFY
        async def beside() -> None:
            meanwhile()
            await self._drafting.catch_up(self._behind(plan, proposals), traceparent)

        judged = await self._verifying.verify(
            plan, proposals.by_id, traceparent=traceparent, meanwhile=beside
        )
        # COMMIT
        outcome = Outcome(full=judged.full, failed=judged.failed, lost=judged.lost)
        for asked, verdict in judged.verdicts:
            self._commit(outcome, asked, verdict, started_ns)
        finished_ns = self._clock()
        self._learn(plan, proposals, judged)
        self._account(judged, proposals, started_ns, finished_ns)
        if self._observer.enabled:
            self._records(
                self._record(
                    plan, ks, proposals, judged, traceparent, started_ns, finished_ns, waiting
                )
            )
        return outcome

    # --- SPECULATE ---------------------------------------------------------------------------

    def _choose(self, decode: list[Sequence]) -> list[int]:
        if not decode:
            return []
        drafting = self._drafting
        if drafting.available:
            near = drafting.select([seq for seq in decode if drafting.usable(seq)])
        else:
            near = set()
        return self._speculation.choose(
            [Lane(seq.acceptance, seq.max_k if seq in near else 0, seq.request.k) for seq in decode]
        )

    def _behind(self, plan: Plan[Sequence], proposals: Proposals) -> list[Sequence]:
        """Sequences whose draft may catch up while the verifier works."""
        if not self._drafting.available:
            return []
        wanted = self._speculation.wanted
        made = []
        for seq in plan.decode:
            if seq.sequence_id not in proposals.by_id and wanted(seq.request.k):
                made.append(seq)
        for seq, _ in plan.prefill:
            if wanted(seq.request.k):
                made.append(seq)
        return made

    # --- COMMIT ------------------------------------------------------------------------------

    def _commit(self, outcome: Outcome, asked: Asked, verdict: pb.Verdict, started_ns: int) -> None:
        seq = asked.sequence
        outcome.progressed = True
        if not seq.statistics.admitted_ns:
            # The previous round's end may be before it arrived.
            seq.statistics.admitted_ns = max(started_ns, seq.statistics.arrived_ns)
            outcome.admitted.append(seq)
        if not verdict.HasField("next_token") or seq.output.finish is not None:
            return
        accepted = verdict.num_accepted
        if asked.proposal is None:
            proposed = 0
            tokens = [verdict.next_token]
            origins = [BASE]
        else:
            proposed = len(asked.proposal.tokens)
            tokens = [*asked.proposal.tokens[:accepted], verdict.next_token]
            origins = [ACCEPTED] * accepted
            origins.append(BONUS if accepted == proposed else CORRECTED)
            self._drafting.settle(seq, asked.n, proposed, accepted)
            seq.acceptance.observe(proposed, accepted)
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

    def _learn(self, plan: Plan[Sequence], proposals: Proposals, judged: Judged) -> None:
        """Tells the controller what the round took, where that says something of decoding."""
        if plan.prefill or judged.lost or not plan.decode or not proposals.clean:
            return
        self._speculation.observe(
            len(plan.decode),
            max((len(one.tokens) for one in proposals.by_id.values()), default=0),
            judged.timing.rows,
            proposals.timing.seconds,
            judged.timing.seconds,
        )

    def _account(
        self, judged: Judged, proposals: Proposals, started_ns: int, finished_ns: int
    ) -> None:
        seconds = (finished_ns - started_ns) / 1e9
        for asked, verdict in judged.verdicts:
            statistics = asked.sequence.statistics
            # The round that wrote the first token belongs to the prefill phase.
            if verdict.HasField("next_token") and statistics.rounds > 1:
                statistics.spent(
                    seconds, proposals.timing.model_seconds, judged.timing.model_seconds
                )

    def _record(
        self,
        plan: Plan[Sequence],
        ks: list[int],
        proposals: Proposals,
        judged: Judged,
        traceparent: str,
        started_ns: int,
        finished_ns: int,
        waiting: int,
    ) -> RoundRecord:
        asked_k = {seq.sequence_id: k for seq, k in zip(plan.decode, ks, strict=True)}
        answered = {one.sequence.sequence_id: (one, verdict) for one, verdict in judged.verdicts}
        made = []
        for seq in (*plan.decode, *(seq for seq, _ in plan.prefill)):
            key = seq.sequence_id
            found = answered.get(key)
            proposal = proposals.by_id.get(key)
            proposed = 0 if proposal is None else len(proposal.tokens)
            accepted = emitted = rows = 0
            n = len(seq.log)
            if found is not None:
                one, verdict = found
                n, rows, accepted = one.n, one.rows, verdict.num_accepted
                emitted = len(seq.log) - n
            made.append(
                SequenceRound(
                    request_id=seq.request.request_id,
                    sample_index=seq.sample_index,
                    sequence_id=key,
                    committed_len=n,
                    k=asked_k.get(key, 0),
                    proposed=proposed,
                    accepted=accepted,
                    emitted=emitted,
                    rows=rows,
                    rollback=proposed - accepted if found is not None else 0,
                    verify_epoch=seq.verify.epoch,
                    draft_epoch=seq.draft.epoch,
                    refused=judged.refusals.get(key, 0),
                )
            )
        return RoundRecord(
            round=self._round,
            traceparent=traceparent,
            started_ns=started_ns,
            finished_ns=finished_ns,
            draft=proposals.timing,
            verify=judged.timing,
            sequences=tuple(made),
            waiting=waiting,
            lost="verify" if judged.lost else "",
        )


def _request_ids(plan: Plan[Sequence]) -> list[str]:
    ids = dict.fromkeys(seq.request.request_id for seq in plan.decode)
    ids.update(dict.fromkeys(seq.request.request_id for seq, _ in plan.prefill))
    return list(ids)


def _logprobs(message: pb.PositionLogprobs) -> PositionLogprobs:
    return PositionLogprobs(
        message.logprob, tuple(zip(message.top_ids, message.top_logprobs, strict=True))
    )
