"""One round, end to end: SPECULATE, VERIFY, COMMIT.

    choose K  ->  ask the draft  ->  ask the verifier  ->  append to the logs
                                          |
                                          +-- while it works: hand out text and records,
                                              let the draft catch up

A round in which no sequence has a proposal skips the draft. Sequences whose prompt is being
taken in go to both services side by side. Where nothing but decoding is to be done the services
are granted rounds that they run by themselves (``granted``); here those are committed and
learnt from like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from outrider.coordinator.requests.sequence import Sequence
from outrider.coordinator.rounds import recording
from outrider.coordinator.rounds.choose_k import Speculable, Speculation
from outrider.coordinator.rounds.drafting import Drafting, Proposals
from outrider.coordinator.rounds.granted import GrantedRound, GrantedRounds, GrantRun
from outrider.coordinator.rounds.scheduler import RoundPlan
from outrider.coordinator.rounds.verifying import Prepared, Verdicts, VerifyAsked, Verifying
from outrider.coordinator.telemetry.records import Observer, RoundRecord, WallClock
from outrider.protos import generation_pb2 as public
from outrider.protos import speculation_pb2 as pb
from outrider.shared.core.errors import OutriderError
from outrider.shared.core.traceparent import stepped
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


class RoundRunner:
    """Runs rounds over the two services."""

    def __init__(
        self,
        drafting: Drafting,
        verifying: Verifying,
        speculation: Speculation,
        granted: GrantedRounds,
        *,
        observer: Observer,
        clock: WallClock,
        records: Callable[[RoundRecord], None],
    ) -> None:
        """``records`` takes the record of each round; it is to hand it on later."""
        self._drafting = drafting
        self._verifying = verifying
        self._speculation = speculation
        self._granted = granted
        self._observer = observer
        self._clock = clock
        self._records = records
        self._round = 0
        self._reflect: Callable[[], None] | None = None

    def choose(self, plan: RoundPlan[Sequence]) -> list[int]:
        """K for each sequence of ``plan.decode``; to be asked once a round."""
        return self._choose(plan.decode)

    async def round(
        self,
        plan: RoundPlan[Sequence],
        ks: list[int],
        started_ns: int,
        meanwhile: Callable[[], None],
        waiting: int,
    ) -> Outcome:
        """Runs one round; ``meanwhile`` is called once, while the verifier works."""
        self._round += 1
        number, observer = self._round, self._observer
        traceparent = ""
        if observer.enabled:
            traceparent = observer.traceparent(number, _request_ids(plan))
        # SPECULATE
        wanted = [(seq, k) for seq, k in zip(plan.decode, ks, strict=True) if k > 0]
        message: list[Prepared] = []
        proposals = await self._drafting.propose(
            wanted,
            traceparent,
            meanwhile=lambda: message.append(self._verifying.prepare(plan, traceparent)),
        )

        # VERIFY
        async def beside() -> None:
            self.reflect()
            meanwhile()
            await self._drafting.catch_up(self._behind(plan, proposals), traceparent)

        verdicts = await self._verifying.verify(message[0], proposals.by_id, beside)
        # COMMIT
        outcome = Outcome(full=verdicts.full, failed=verdicts.failed, lost=verdicts.lost)
        for asked, verdict in verdicts.given:
            self._commit(outcome, asked, verdict, started_ns)
        finished_ns = self._clock()
        self._account(verdicts, proposals, started_ns, finished_ns)

        def reflect() -> None:
            self._learn(plan, proposals, verdicts)
            if observer.enabled:
                self._records(
                    recording.round_record(
                        number,
                        plan,
                        ks,
                        proposals,
                        verdicts,
                        traceparent=traceparent,
                        started_ns=started_ns,
                        finished_ns=finished_ns,
                        waiting=waiting,
                    )
                )

        self.reflect()  # where the verifier was lost before anybody had time to
        self._reflect = reflect
        return outcome

    # --- rounds that the services run by themselves ------------------------------------------

    async def grant(
        self, plan: RoundPlan[Sequence], ks: list[int], wake: Callable[[], None]
    ) -> GrantRun | None:
        """Grants rounds where that is possible and nothing else is to be done beside them."""
        if not self._granted.possible(plan, ks) or self._must_catch_up(plan):
            return None
        self.reflect()
        traceparent = ""
        if self._observer.enabled:
            traceparent = self._observer.traceparent(self._round + 1, _request_ids(plan))
        return await self._granted.start(plan, ks, traceparent, wake)

    def take_report(self, run: GrantRun, waiting: int) -> Outcome:
        """Commits what the next report of ``run`` tells."""
        done = self._granted.take(run)
        if done is None:
            return Outcome(lost=run.lost)
        verdicts = done.verdicts
        outcome = Outcome(full=verdicts.full, failed=verdicts.failed)
        for asked, verdict in verdicts.given:
            self._commit(outcome, asked, verdict, done.started_ns)
        self._account(verdicts, done.proposals, done.started_ns, done.finished_ns)
        self._learn(run.plan, done.proposals, verdicts)
        self._note(run, done, waiting)
        return outcome

    def _note(self, run: GrantRun, done: GrantedRound, waiting: int) -> None:
        """Makes the record of one granted round."""
        self._round += 1
        number, observer = self._round, self._observer
        if not observer.enabled:
            return
        traceparent = run.traceparent
        if traceparent and done.step:
            traceparent = stepped(traceparent, done.step)
            observer.follow(number, _request_ids(run.plan), traceparent)
        self._records(
            recording.round_record(
                number,
                run.plan,
                run.ks,
                done.proposals,
                done.verdicts,
                traceparent=traceparent,
                started_ns=done.started_ns,
                finished_ns=done.finished_ns,
                waiting=waiting,
                link=self._granted.link(run),
            )
        )

    async def steer(self, run: GrantRun) -> None:
        """Has the rounds of ``run`` go on as they should, or end."""
        plan = run.plan
        if run.over or run.revoked:
            return
        ks = self._choose(plan.decode)
        if self._must_catch_up(plan):
            await self._granted.revoke(run)
        else:
            await self._granted.steer(run, ks)

    def _must_catch_up(self, plan: RoundPlan[Sequence]) -> bool:
        """Whether the draft is to take in what it lacks, which messages do beside the rounds."""
        drafting = self._drafting
        return any(
            drafting.lacking(seq) and drafting.usable(seq)
            for seq in self._behind(plan, Proposals())
        )

    async def revoke(self, run: GrantRun) -> None:
        """Ends ``run`` after the round that it is in."""
        await self._granted.revoke(run)

    async def finish(self, run: GrantRun) -> None:
        """The verifier has ended ``run``, or is lost."""
        begun = await self._granted.finish(run)
        now = self._clock()
        for step in range(run.steps, begun):
            # Begun and not reported: a service may have made its part of the trace.
            verdicts = Verdicts(lost=run.lost)
            self._note(run, GrantedRound(step, verdicts, Proposals(), run.last_ns or now, now), 0)

    def reflect(self) -> None:
        """Learns from the last round and makes its record, once; off the critical path.

        The next round does it while the verifier works, the loop when there is none.
        """
        if self._reflect is not None:
            reflect, self._reflect = self._reflect, None
            reflect()

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
            [
                Speculable(seq.acceptance, seq.max_k if seq in near else 0, seq.request.k)
                for seq in decode
            ]
        )

    def _behind(self, plan: RoundPlan[Sequence], proposals: Proposals) -> list[Sequence]:
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

    def _commit(
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

    def _learn(self, plan: RoundPlan[Sequence], proposals: Proposals, verdicts: Verdicts) -> None:
        """Tells the controller how the proposals fared, and what the round took where that says
        something of decoding."""
        for asked, verdict in verdicts.given:
            if asked.proposed:
                asked.sequence.acceptance.observe(len(asked.proposed), verdict.num_accepted)
        if plan.prefill or verdicts.lost or not plan.decode or not proposals.clean:
            return
        self._speculation.observe(
            len(plan.decode),
            max((len(one.tokens) for one in proposals.by_id.values()), default=0),
            verdicts.timing.rows,
            proposals.timing.seconds,
            verdicts.timing.seconds,
        )

    def _account(
        self, verdicts: Verdicts, proposals: Proposals, started_ns: int, finished_ns: int
    ) -> None:
        seconds = (finished_ns - started_ns) / 1e9
        for asked, verdict in verdicts.given:
            statistics = asked.sequence.statistics
            # The round that wrote the first token belongs to the prefill phase.
            if verdict.HasField("next_token") and statistics.rounds > 1:
                statistics.spent(
                    seconds, proposals.timing.model_seconds, verdicts.timing.model_seconds
                )


def _request_ids(plan: RoundPlan[Sequence]) -> list[str]:
    ids = dict.fromkeys(seq.request.request_id for seq in plan.decode)
    ids.update(dict.fromkeys(seq.request.request_id for seq, _ in plan.prefill))
    return list(ids)


def _logprobs(message: pb.PositionLogprobs) -> PositionLogprobs:
    return PositionLogprobs(
        message.logprob, tuple(zip(message.top_ids, message.top_logprobs, strict=True))
    )
