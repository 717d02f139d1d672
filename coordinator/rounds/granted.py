"""Granted rounds: the services run by themselves, and this follows them.

A grant gives both services the same sequences. They hand proposals and verdicts to each other
through the mailbox, and the verifier reports each round over its stream, so the token log is
here as ever and the coordinator is on no round's critical path. K may change in mid-grant;
whatever else changes (a new request, an end, a cancellation) ends it after the round that runs,
and the next rounds are granted anew. Where nothing is drafted the verifier runs alone, over
any link.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from outrider.coordinator.requests.sequence import Sequence
from outrider.coordinator.rounds.draft_messages import DraftGrant, DraftOffer, Proposals
from outrider.coordinator.rounds.drafting import Drafting
from outrider.coordinator.rounds.scheduler import RoundPlan
from outrider.coordinator.rounds.verifying import Verdicts, Verifying
from outrider.coordinator.services.mailbox_setup import MailboxSetup
from outrider.coordinator.telemetry.records import ServiceTiming, WallClock
from outrider.protos import speculation_pb2 as pb
from outrider.shared.core.errors import ServiceUnavailable
from outrider.shared.core.links import LINKS, MESSAGES


@dataclass(slots=True)
class GrantRun:
    """One grant that runs."""

    grant: pb.Grant
    plan: RoundPlan[Sequence]
    ks: list[int]
    traceparent: str
    drafted: DraftGrant | None
    wake: Callable[[], None]
    reports: deque[pb.VerifyResponse | None] = field(default_factory=deque)
    sequences: dict[int, Sequence] = field(default_factory=dict)
    over: bool = False
    """The verifier's last word was taken from ``reports``, or its stream was lost."""
    lost: bool = False
    """Its stream was lost."""
    failed: bool = False
    """The verifier has waited for the draft in vain."""
    steps: int = 0
    """Rounds that were reported."""
    revoked: bool = False
    left: int = 0
    """Rounds granted and not yet reported."""
    last_ns: int = 0
    """End of the last round."""
    ahead_ns: int = 0
    """What this clock is ahead of the verifier's, where that one is all there is to go by."""

    def heard(self, response: pb.VerifyResponse | None) -> None:
        """A report came in, or the verifier is lost."""
        self.reports.append(response)
        self.wake()

    def drop(self) -> None:
        """Passes over what was reported, but for the end."""
        for response in self.reports:
            self.over = self.over or response is None or response.HasField("grant_end")
        self.reports.clear()


@dataclass(slots=True)
class GrantedRound:
    """One round of a grant, as a round of the coordinator's own would be."""

    step: int
    verdicts: Verdicts
    proposals: Proposals
    started_ns: int
    finished_ns: int


class GrantedRounds:
    """Grants rounds and reads the reports."""

    def __init__(
        self,
        drafting: Drafting,
        verifying: Verifying,
        mailbox_setup: MailboxSetup,
        *,
        clock: WallClock,
        rounds: int,
        draft_patience: float,
    ) -> None:
        """``rounds``: how many are granted at a time; 0: none ever."""
        self._drafting = drafting
        self._verifying = verifying
        self._mailbox_setup = mailbox_setup
        self._clock = clock
        self._rounds = rounds
        self._patience = draft_patience
        self._ids = itertools.count(1)

    def possible(self, plan: RoundPlan[Sequence], ks: list[int]) -> bool:
        """Whether the sequences of ``plan``, with these Ks, can go on without messages."""
        if not self._rounds or plan.prefill or not self._verifying.grants:
            return False
        if not all(seq.verify.open for seq in plan.decode):
            return False
        drafted = [seq for seq, k in zip(plan.decode, ks, strict=True) if k]
        return not drafted or (
            self._mailbox_setup.mailbox != 0
            and self._drafting.available
            and not any(self._drafting.lacking(seq) for seq in drafted)
            and self._fits(len(plan.decode), max(ks), drafted)
        )

    @property
    def by_device(self) -> bool:
        """Whether the devices take the turns where they can."""
        return bool(self._rounds) and _by_device(self._mailbox_setup.link)

    async def start(
        self, plan: RoundPlan[Sequence], ks: list[int], traceparent: str, wake: Callable[[], None]
    ) -> GrantRun | None:
        """Grants rounds; ``wake`` is called with each report. None where a service is away."""
        link = self._link(plan, ks)
        # The devices draft for all. Where a text is to end they see so by themselves: that it has
        # no proposal does not keep the others from theirs.
        granted = [max(k, 1) for k in ks] if _by_device(link) else ks
        wanted = [(seq, k) for seq, k, given in zip(plan.decode, ks, granted, strict=True) if given]
        grant = pb.Grant(
            id=next(self._ids),
            mailbox=self._mailbox_setup.mailbox if wanted else 0,
            rounds=self._rounds,
            patience_seconds=self._patience,
            sequences=[
                pb.GrantedSequence(
                    k=k,
                    limit=len(seq.log) + seq.output.left,
                    stop_token_ids=(*seq.request.eos_token_ids, *seq.request.stop_token_ids),
                )
                for seq, k in zip(plan.decode, granted, strict=True)
            ],
            link=link,
        )
        run = GrantRun(grant, plan, list(ks), traceparent, None, wake, left=self._rounds)
        run.sequences = {seq.sequence_id: seq for seq in plan.decode}
        try:
            if wanted:
                mine = self._for_draft(grant)
                run.drafted = await self._drafting.grant(wanted, mine, traceparent)
            await self._verifying.grant(plan, grant, traceparent, run.heard)
        except ServiceUnavailable:
            await self._abandon(run)
            return None
        return run

    def take(self, run: GrantRun) -> GrantedRound | None:
        """The next round that was reported; None where the report held none, or there is none."""
        response = run.reports.popleft()
        if response is None:
            run.over = run.lost = True
            return None
        if response.HasField("grant_end"):
            run.over = True
            self._note_end(run, response.grant_end)
        if not response.HasField("granted"):
            return None
        run.left -= 1
        run.steps += 1
        if run.drafted is not None:
            self._drafting.touch()
        verdicts = self._verifying.granted_round(run.sequences, response)
        proposals = Proposals(
            {
                one.sequence_id: DraftOffer(list(one.tokens), ())
                for one in response.granted.proposals
                if one.tokens
            }
        )
        self._time(run, response, verdicts, proposals)
        started = run.last_ns or proposals.timing.sent_ns or verdicts.timing.sent_ns
        run.last_ns = verdicts.timing.answered_ns
        return GrantedRound(response.granted.step, verdicts, proposals, started, run.last_ns)

    async def steer(self, run: GrantRun, ks: list[int]) -> None:
        """Changes K where it should, and sees to it that the rounds do not run out."""
        changed = False
        for index, (seq, k) in enumerate(zip(run.plan.decode, ks, strict=True)):
            now = run.ks[index]
            if k == min(now, max(seq.max_k, 0)):
                continue  # as it is, but for the end that is near
            if (k > 0) != (now > 0) or not self._fits(1, k, []):
                await self.revoke(run)
                return
            run.ks[index], changed = k, True
        if changed or run.left <= self._rounds // 2:
            run.left = self._rounds
            await self._verifying.change(
                pb.GrantChange(id=run.grant.id, rounds=self._rounds, ks=run.ks if changed else ())
            )

    async def revoke(self, run: GrantRun) -> None:
        """Ends the grant after the round that runs."""
        if not (run.over or run.revoked):
            run.revoked = True
            await self._verifying.change(pb.GrantChange(id=run.grant.id))

    async def finish(self, run: GrantRun) -> int:
        """The verifier is done with the grant, or lost: sees to the draft.

        Returns the rounds that were begun, which may be more than were reported.
        """
        begun = run.steps + run.lost
        if run.drafted is None:
            return begun
        if run.lost:
            await self._abandon(run)
        rounds = await self._drafting.granted(run.drafted, wait=not run.failed)
        if _by_device(run.grant.link) and not (run.steps or run.revoked or run.lost):
            # One of the two can't, and has logged why: the hosts take such turns from now on.
            # With a smaller K, and so fewer rows, it may be able to.
            for sequence in run.plan.decode:
                sequence.host_k = min(sequence.host_k, max(run.ks))
        return max(begun, rounds)

    # --- parts -----------------------------------------------------------------------------------

    def _link(self, plan: RoundPlan[Sequence], ks: list[int]) -> str:
        """Name of the link that proposals for ``plan``, with these Ks, are to travel by."""
        if not any(ks):
            return MESSAGES
        name = self._mailbox_setup.link
        # The devices draft for all, or take no turns.
        hosts = any(
            seq.host_k <= max(ks) or (not k and not self._only_ends(seq))
            for seq, k in zip(plan.decode, ks, strict=True)
        )
        return LINKS[name].beneath if hosts and _by_device(name) else name

    def _only_ends(self, seq: Sequence) -> bool:
        """Whether a sequence is not drafted for because its text has no room for a proposal."""
        return seq.max_k < 1 and seq.draft.open and not self._drafting.lacking(seq)

    def _fits(self, sequences: int, k: int, drafted: list[Sequence]) -> bool:
        limits = self._mailbox_setup.limits
        return (
            sequences <= limits.max_sequences
            and k <= limits.max_k
            and all(
                seq.decoding.draft_top <= limits.row_entries for seq in drafted if seq.needs_rows
            )
        )

    def _for_draft(self, grant: pb.Grant) -> pb.Grant:
        """The draft waits as long as the verifier's process lives: that one may be slow."""
        return pb.Grant(
            id=grant.id,
            mailbox=grant.mailbox,
            rounds=grant.rounds,
            patience_seconds=3600.0,
            sequences=[one for one in grant.sequences if one.k],
            link=grant.link,
        )

    async def _abandon(self, run: GrantRun) -> None:
        """No verifier will tell the draft of the end."""
        if run.drafted is not None:
            await self._drafting.change(pb.GrantChange(id=run.grant.id))

    def _note_end(self, run: GrantRun, end: pb.GrantEnd) -> None:
        run.failed = end.reason in (pb.GRANT_END_REASON_PEER, pb.GRANT_END_REASON_LATE)
        # Late word of a mailbox that has been replaced says nothing of the new one.
        if (
            end.reason == pb.GRANT_END_REASON_PEER
            and run.grant.mailbox == self._mailbox_setup.mailbox
        ):
            self._mailbox_setup.lost(end.message)

    def _time(
        self, run: GrantRun, response: pb.VerifyResponse, verdicts: Verdicts, proposals: Proposals
    ) -> None:
        """The exchanges as the services saw them; they share this host's clock."""
        granted = response.granted
        if run.drafted is None:
            # The verifier may be anywhere: its clock is set by when its first report came. When
            # each one came says less, for some wait longer to be read.
            run.ahead_ns = run.ahead_ns or self._clock() - granted.verify_answered_ns
            sent = granted.verify_asked_ns + run.ahead_ns
            answered = granted.verify_answered_ns + run.ahead_ns
        else:
            sent, answered = map(
                self._clock.at, (granted.verify_asked_ns, granted.verify_answered_ns)
            )
            proposals.timing = ServiceTiming.told(
                self._clock.at(granted.draft_asked_ns),
                self._clock.at(granted.draft_answered_ns),
                granted.draft,
            )
        verdicts.timing = ServiceTiming.told(sent, answered, response.timing)


def _by_device(link: str) -> bool:
    return LINKS[link].way == "device"
