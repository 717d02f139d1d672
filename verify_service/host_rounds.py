"""The verifier's half of free-running rounds. It is the master of the grant: it counts the rounds,
watches limits and stop tokens, and tells the coordinator of each round while the draft already
works on the next one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from outrider.protos import speculation_pb2 as pb
from outrider.shared.core import wire
from outrider.shared.core.errors import ProtocolError
from outrider.shared.core.types import Proposal, RoundResult, Verdict, VerifyItem
from outrider.shared.link.doorbell import Doorbell, PeerGone, PeerLate
from outrider.shared.link.mailbox import ENDS, Judgement, ProposalHead, VerdictHead
from outrider.shared.rounds.grants import Control, End, EndReason, end_message, next_k

Seen = Callable[[int, Sequence[VerifyItem], RoundResult[Verdict], float, float], None]
"""Step, items, result, and when it began and was answered by ``time.perf_counter``."""

NO_HEAD = ProposalHead(0, 0)


@dataclass(slots=True)
class Lane:
    """Where one sequence stands with the verifier."""

    sequence_id: int
    epoch: int
    base_len: int
    append: tuple[int, ...]
    k: int
    limit: int
    """Log length at which the grant ends."""
    stops: frozenset[int]

    @property
    def committed_len(self) -> int:
        """Tokens of the log that are final."""
        return self.base_len + len(self.append)

    def judged(self, verdict: Verdict, proposal: Sequence[int]) -> bool:
        """Goes on from the verdict; whether the sequence has come to its end."""
        assert verdict.next_token is not None
        self.base_len, self.append = verdict.committed_len - 1, (verdict.next_token,)
        return (
            verdict.committed_len >= self.limit
            or verdict.next_token in self.stops
            or not self.stops.isdisjoint(proposal[: verdict.num_accepted])
        )


class FreeVerify:
    """Takes the verifier's turns; knows nothing of how proposals travel."""

    def __init__(
        self, session: Any, items: Sequence[VerifyItem], granted: Sequence[pb.GrantedSequence]
    ) -> None:
        """``session``: the stream's sequences; ``items``: where they stand."""
        if len(items) != len(granted):
            raise ProtocolError(f"a grant of {len(granted)} sequences with {len(items)} items")
        self._session = session
        self.lanes = [
            Lane(
                item.sequence_id, item.epoch, item.base_len, item.append, one.k, one.limit,
                frozenset(one.stop_token_ids),
            )
            for item, one in zip(items, granted, strict=True)
        ]  # fmt: skip
        self.drafted = any(one.k for one in granted)
        self.items: list[VerifyItem] = []
        """What the last turn asked of the engine."""
        self.stopped = False
        """Whether a sequence has come to its end."""

    def judge(self, proposals: Sequence[Proposal]) -> RoundResult[Verdict]:
        """Judges one proposal for each sequence; those without one decode a token."""
        return self._served(proposals, self._session.round)

    def settle(
        self, proposals: Sequence[Proposal], found: Sequence[tuple[int, int]]
    ) -> RoundResult[Verdict]:
        """``judge`` where the device has judged: accepted and next token of each sequence."""
        return self._served(proposals, lambda items: self._session.settle(items, found))

    def _served(
        self,
        proposals: Sequence[Proposal],
        serve: Callable[[Sequence[VerifyItem]], RoundResult[Verdict]],
    ) -> RoundResult[Verdict]:
        offered = {one.sequence_id: one for one in proposals}
        self.items = []
        for lane in self.lanes:
            found = offered.pop(lane.sequence_id, None)
            if found is None:
                item = VerifyItem(lane.sequence_id, lane.epoch, lane.base_len, lane.append)
            else:
                # Its epoch is the draft's own: each service counts how often it was opened there.
                if found.committed_len != lane.committed_len:
                    raise ProtocolError(
                        f"a proposal at {found.committed_len}; sequence {lane.sequence_id} "
                        f"stands at {lane.committed_len}"
                    )
                item = VerifyItem(
                    lane.sequence_id, lane.epoch, lane.base_len, lane.append, found.tokens,
                    found.rows,
                )  # fmt: skip
            self.items.append(item)
        if offered:
            raise ProtocolError(f"proposals for sequences {sorted(offered)}, which are not granted")
        result = serve(self.items)
        if not result.refusals:
            for lane, item, verdict in zip(self.lanes, self.items, result.answers, strict=True):
                self.stopped |= lane.judged(verdict, item.proposal)
        return result

    def change(self, ks: Sequence[int]) -> None:
        """New Ks from the next round on, in the grant's order; others are ignored."""
        if len(ks) == len(self.lanes):
            for lane, k in zip(self.lanes, ks, strict=True):
                lane.k = k if lane.k else 0

    def judgements(self, verdicts: Sequence[Verdict]) -> list[Judgement]:
        """The verdicts as the draft needs them, of the sequences that it drafts for."""
        return [
            Judgement(
                one.sequence_id, one.epoch, one.num_accepted, one.next_token or 0,
                one.committed_len, next_k(lane.k, lane.limit, one.committed_len),
            )
            for lane, one in zip(self.lanes, verdicts, strict=True)
            if lane.k
        ]  # fmt: skip


def run(
    session: Any, message: pb.VerifyRequest, doorbell: Doorbell | None, control: Control, seen: Seen
) -> Generator[pb.VerifyResponse, None, None]:
    """Runs a grant to its end; an answer a round, the last one saying that it is the last."""
    grant = message.grant
    steps = 0
    end: End | None = None
    whole = False
    try:
        free = FreeVerify(session, wire.read_verify_items(message), grant.sequences)
        if free.drafted and doorbell is None:
            raise PeerGone(f"mailbox {grant.mailbox} is not mapped here")
        asked = time.perf_counter_ns()
        while end is None:
            head, proposals = NO_HEAD, list[Proposal]()
            if free.drafted:
                assert doorbell is not None
                found = doorbell.await_turn(
                    (grant.id, steps), doorbell.mailbox.read_proposals, grant.patience_seconds
                )
                assert found is not None  # nothing interrupts this wait but the draft's ring
                head, proposals = found
                if head.flags & ENDS and not proposals:
                    end = End(EndReason.REFUSED, "the draft has nothing to propose")
                    break
            began = time.perf_counter_ns()
            result = free.judge(proposals)
            left, ks = control.step()
            free.change(ks)
            end = end_of(free, result, head, left, control)
            if free.drafted:
                assert doorbell is not None
                flags = 0 if end is None else ENDS
                judgements = [] if result.refusals else free.judgements(result.answers)
                doorbell.mailbox.write_verdicts(VerdictHead(grant.id, steps, flags), judgements)
            done = time.perf_counter_ns()
            if doorbell is not None:
                doorbell.ring()
            response = report(message.round, steps, free, result, head, (asked, began, done))
            steps += 1
            if end is not None:
                response.grant_end.CopyFrom(end_message(grant, end, steps))
                whole = True
            yield response
            seen(steps - 1, free.items, result, began / 1e9, done / 1e9)
            asked = done
        if not whole:
            whole = True
            yield pb.VerifyResponse(round=message.round, grant_end=end_message(grant, end, steps))
    except PeerLate as error:
        whole = True
        assert doorbell is not None
        tell_end(doorbell, grant.id, steps)
        end = End(EndReason.LATE, str(error))
        yield pb.VerifyResponse(round=message.round, grant_end=end_message(grant, end, steps))
    except (PeerGone, ProtocolError) as error:
        end = End(EndReason.PEER, str(error))
        yield pb.VerifyResponse(round=message.round, grant_end=end_message(grant, end, steps))
    finally:
        # Also where the coordinator is gone in mid-grant: the draft is not to wait for us.
        if doorbell is not None and not whole:
            doorbell.close()


def tell_end(doorbell: Doorbell, grant: int, step: int) -> None:
    """The verifier's last word to the draft, in place of the verdicts of ``step``."""
    doorbell.mailbox.write_verdicts(VerdictHead(grant, step, ENDS), ())
    with contextlib.suppress(PeerGone):  # it needs no word where it is gone by now
        doorbell.ring()


def end_of(
    free: FreeVerify, result: RoundResult[Verdict], head: ProposalHead, left: int, control: Control
) -> End | None:
    """Why this round is the grant's last, or None."""
    if result.refusals:
        return End(EndReason.REFUSED, result.refusals[0].message)
    if free.stopped:
        return End(EndReason.STOPPED)
    if control.interrupted or head.flags & ENDS:
        return End(EndReason.REVOKED)
    return End(EndReason.CREDITS) if left <= 0 else None


def report(
    number: int,
    step: int,
    free: FreeVerify,
    result: RoundResult[Verdict],
    head: ProposalHead,
    times: tuple[int, int, int],
) -> pb.VerifyResponse:
    """What the coordinator is told of one round."""
    asked, began, done = times
    response = wire.write_verify_response(number, result, (done - began) / 1e9)
    report = response.free
    report.step = step
    for item in free.items:
        report.proposals.add(
            sequence_id=item.sequence_id,
            epoch=item.epoch,
            committed_len=item.base_len + len(item.append),
            tokens=item.proposal,
        )
    if free.drafted:
        report.draft.model_seconds = head.model_seconds
        report.draft.service_seconds = head.service_seconds
        report.draft.rows = head.rows
        # At first it began by itself, and perhaps sooner than the verifier.
        report.draft_asked_ns = min(asked, began - int(head.service_seconds * 1e9))
        report.draft_answered_ns = began
    report.verify_asked_ns, report.verify_answered_ns = began, done
    return response
