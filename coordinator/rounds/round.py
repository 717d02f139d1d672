"""One round, end to end: SPECULATE, VERIFY, COMMIT.

    choose K  ->  ask the draft  ->  ask the verifier  ->  append to the logs
                                          |
                                          +-- while it works: hand out text and records,
                                              let the draft catch up

A round in which no sequence has a proposal skips the draft. Prompts are taken in by the verifier
beside those that decode, and by the draft when they have their first token. Where nothing but
decoding is to be done the services are granted rounds that they run by themselves
(``granted``); here those are committed and learnt from like any other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from outrider.coordinator.requests.sequence import Sequence
from outrider.coordinator.rounds.commit import Commit, Outcome
from outrider.coordinator.rounds.controller.batch import Speculable
from outrider.coordinator.rounds.controller.choose_k import Speculation
from outrider.coordinator.rounds.draft_messages import Proposals
from outrider.coordinator.rounds.drafting import Drafting
from outrider.coordinator.rounds.granted import GrantedRound, GrantedRounds, GrantRun
from outrider.coordinator.rounds.prompt_budget import PromptBudget
from outrider.coordinator.rounds.recording import DoneRound, round_record
from outrider.coordinator.rounds.scheduler import RoundPlan
from outrider.coordinator.rounds.verifying import Prepared, Verdicts, Verifying
from outrider.coordinator.telemetry.records import Observer, RoundRecord, WallClock
from outrider.shared.core.traceparent import stepped


class RoundRunner:
    """Runs rounds over the two services."""

    def __init__(
        self,
        drafting: Drafting,
        verifying: Verifying,
        speculation: Speculation,
        granted: GrantedRounds,
        budget: PromptBudget,
        *,
        observer: Observer,
        clock: WallClock,
    ) -> None:
        self._drafting = drafting
        self._verifying = verifying
        self._speculation = speculation
        self._granted = granted
        self._commit = Commit(drafting, speculation, budget, clock)
        self._observer = observer
        self._clock = clock
        self._records: deque[RoundRecord] = deque()
        self._round = 0
        self._context = ""  # of the last round by messages
        self._last: DoneRound | None = None  # not yet reflected on

    async def round(
        self,
        plan: RoundPlan[Sequence],
        ks: list[int],
        started_ns: int,
        meanwhile: Callable[[], None],
        waiting: int,
    ) -> Outcome:
        """Runs one round by messages; ``meanwhile`` is called once, while the verifier works."""
        self._round += 1
        number = self._round
        traceparent = self._context = self._traceparent(number, plan)
        proposals, prepared = await self._speculate(plan, ks, traceparent)
        verdicts = await self._verify(plan, proposals, prepared, meanwhile, traceparent)
        outcome = self._commit.apply(verdicts, started_ns)
        done = DoneRound(
            number, traceparent, plan, ks, proposals, verdicts, started_ns, self._clock(), waiting,
            self._speculation.choice,
        )  # fmt: skip
        self._commit.account(done)
        self._reflect()  # where the verifier was lost before anybody had time to
        self._last = done
        return outcome

    def hand_over(self) -> None:
        """Gives the records of rounds to the observer."""
        self._reflect()
        while self._records:
            self._observer.round(self._records.popleft())

    def _reflect(self) -> None:
        """Learns from the last round and makes its record, once; off the critical path.

        The next round does it while the verifier works, the loop when there is none.
        """
        if self._last is not None:
            done, self._last = self._last, None
            self._commit.learn(done)
            self._record(done)

    # --- SPECULATE ---------------------------------------------------------------------------

    def hold_back(self, plan: RoundPlan[Sequence]) -> None:
        """Takes those out of ``plan`` whose tokens would depend on how fast the draft is."""
        held = self._drafting.awaited(plan.decode)
        if held:
            plan.held = held
            plan.decode = [seq for seq in plan.decode if seq not in held]

    async def catch_up(self, plan: RoundPlan[Sequence]) -> None:
        """Has the draft take in what those that ``plan`` holds back wait for.

        That is behind the round before, and in its trace.
        """
        await self._drafting.catch_up(self._behind(plan, Proposals()), self._context)

    def choose(self, plan: RoundPlan[Sequence]) -> list[int]:
        """K for each sequence of ``plan.decode``; to be asked once a round."""
        decode, drafting = plan.decode, self._drafting
        if not decode:
            return []
        usable = drafting.available
        together = self._speculation.together = self._granted.by_device
        # Where devices take the turns of a batch, a round by messages that takes prompts along
        # takes as long as several of theirs.
        prompts = not (together and len(decode) > 1)
        near = drafting.near(decode, prompts=prompts) if usable and not drafting.busy else set()
        return self._speculation.choose(
            [
                Speculable(
                    seq.acceptance,
                    seq.max_k if usable and drafting.usable(seq) else 0,
                    seq.request.k,
                    seq.output.emitted,
                    seq.output.left,
                    seq in near,
                )
                for seq in decode
            ]
        )

    async def _speculate(
        self, plan: RoundPlan[Sequence], ks: list[int], traceparent: str
    ) -> tuple[Proposals, Prepared]:
        """The draft's proposals, and the verifier's message made while it worked."""
        wanted = [(seq, k) for seq, k in zip(plan.decode, ks, strict=True) if k > 0]
        prepared: list[Prepared] = []
        proposals = await self._drafting.propose(
            wanted,
            traceparent,
            meanwhile=lambda: prepared.append(self._verifying.prepare(plan, traceparent)),
        )
        return proposals, prepared[0]

    def _behind(self, plan: RoundPlan[Sequence], proposals: Proposals) -> list[Sequence]:
        """Sequences whose draft may catch up while the verifier works: see ``drafting``."""
        if not self._drafting.available:
            return []
        wanted = self._speculation.wanted
        sequences = [seq for seq in plan.decode if seq.sequence_id not in proposals.by_id]
        # A prompt that several samples share is taken in for the first of them.
        parents = [seq.parent for seq in plan.held if seq.parent is not None]
        return [
            seq
            for seq in dict.fromkeys([*parents, *plan.held, *sequences])
            if seq.started and seq.output.finish is None and wanted(seq.request.k, seq.acceptance)
        ]

    def _others_wait(self, plan: RoundPlan[Sequence]) -> bool:
        """Whether what the draft takes in meanwhile delays proposals for others."""
        wanted = self._speculation.wanted
        near = self._drafting.near(plan.decode)
        return any(wanted(seq.request.k, seq.acceptance) for seq in near)

    # --- VERIFY ------------------------------------------------------------------------------

    async def _verify(
        self,
        plan: RoundPlan[Sequence],
        proposals: Proposals,
        prepared: Prepared,
        meanwhile: Callable[[], None],
        traceparent: str,
    ) -> Verdicts:
        """The verdicts; while the verifier works, all that can wait is done."""

        drafting = self._drafting
        proposals.clean &= not drafting.busy

        async def beside() -> None:
            self._reflect()
            meanwhile()
            behind = self._behind(plan, proposals)
            if await drafting.catch_up(behind, traceparent, delays=self._others_wait(plan)):
                proposals.clean = False

        return await self._verifying.verify(prepared, proposals.by_id, beside)

    # --- rounds that the services run by themselves ------------------------------------------

    async def grant(
        self, plan: RoundPlan[Sequence], ks: list[int], wake: Callable[[], None]
    ) -> GrantRun | None:
        """Grants rounds where that is possible and nothing else is to be done beside them."""
        if not self._granted.possible(plan, ks) or self._must_catch_up(plan):
            return None
        self._reflect()
        return await self._granted.start(plan, ks, self._traceparent(self._round + 1, plan), wake)

    def take_report(self, run: GrantRun, waiting: int) -> Outcome:
        """Commits what the next report of ``run`` tells."""
        told = self._granted.take(run)
        if told is None:
            return Outcome(lost=run.lost)
        outcome = self._commit.apply(told.verdicts, told.started_ns)
        done = self._done(run, told, waiting)
        self._commit.account(done)
        self._commit.learn(done)
        self._record(done)
        return outcome

    async def steer(self, run: GrantRun) -> None:
        """Has the rounds of ``run`` go on as they should, or end."""
        if run.over or run.revoked:
            return
        ks = self.choose(run.plan)
        if self._must_catch_up(run.plan):
            await self._granted.revoke(run)
        else:
            await self._granted.steer(run, ks)

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
            told = GrantedRound(step, verdicts, Proposals(), run.last_ns or now, now)
            self._record(self._done(run, told, waiting=0))

    def _must_catch_up(self, plan: RoundPlan[Sequence]) -> bool:
        """Whether the draft is to take in what it lacks, which messages do beside the rounds."""
        drafting = self._drafting
        return any(
            drafting.lacking(seq) and drafting.usable(seq)
            for seq in self._behind(plan, Proposals())
        )

    def _done(self, run: GrantRun, told: GrantedRound, waiting: int) -> DoneRound:
        self._round += 1
        told.proposals.clean = not self._drafting.busy
        traceparent = run.traceparent
        if traceparent and told.step:
            traceparent = stepped(traceparent, told.step)
            self._observer.follow(self._round, _request_ids(run.plan), traceparent)
        return DoneRound(
            self._round, traceparent, run.plan, run.ks, told.proposals, told.verdicts,
            told.started_ns, told.finished_ns, waiting, self._speculation.choice, run.grant.link,
            begins=told.step == 0,
        )  # fmt: skip

    # --- parts -------------------------------------------------------------------------------

    def _traceparent(self, number: int, plan: RoundPlan[Sequence]) -> str:
        """What the messages of round ``number`` carry; empty where nobody traces it."""
        if not self._observer.enabled:
            return ""
        return self._observer.traceparent(number, _request_ids(plan))

    def _record(self, done: DoneRound) -> None:
        if self._observer.enabled:
            self._records.append(round_record(done))


def _request_ids(plan: RoundPlan[Sequence]) -> list[str]:
    ids = dict.fromkeys(seq.request.request_id for seq in plan.decode)
    ids.update(dict.fromkeys(seq.request.request_id for seq, _ in plan.prefill))
    return list(ids)
