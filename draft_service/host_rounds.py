"""The draft's half of free-running rounds: propose, wait for the verdicts, go on from there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from outrider.protos import speculation_pb2 as pb
from outrider.shared.core import wire
from outrider.shared.core.errors import ProtocolError
from outrider.shared.core.types import Proposal, ProposeItem, RoundResult
from outrider.shared.link.doorbell import Doorbell, PeerGone
from outrider.shared.link.mailbox import ENDS, Judgement, ProposalHead
from outrider.shared.rounds.grants import Control, End, EndReason, end_message

Seen = Callable[[int, Sequence[ProposeItem], RoundResult[Proposal], float, float], None]
"""Step, items, result, and when it began and was answered by ``time.perf_counter``."""


@dataclass(slots=True)
class Lane:
    """Where one sequence stands with the draft."""

    sequence_id: int
    epoch: int
    base_len: int
    """Tokens whose KV is kept."""
    append: tuple[int, ...]
    """What the log has after them, ending in the pending token."""
    k: int
    proposal: tuple[int, ...] = ()

    @property
    def log_len(self) -> int:
        """Tokens of the log, the proposal not among them."""
        return self.base_len + len(self.append)

    def item(self) -> ProposeItem:
        """What the engine is asked for."""
        return ProposeItem(self.sequence_id, self.epoch, self.base_len, self.append, self.k)

    def proposed(self, proposal: Proposal) -> None:
        """All of ``append`` is taken in, and of the proposal all but its last token."""
        self.base_len += len(self.append)
        self.append = ()
        self.proposal = proposal.tokens

    def judged(self, one: Judgement) -> None:
        """What of the proposal is in the log, the base's own token, and what is lacking."""
        new = (*self.proposal[: one.num_accepted], one.next_token)
        # Of `new` the draft has the KV of the accepted ones, save that of its very last token.
        kept = min(one.num_accepted, max(len(self.proposal) - 1, 0))
        self.base_len += kept
        self.append += new[kept:]
        self.proposal = ()
        self.k = one.next_k


class FreeDraft:
    """Takes the draft's turns; knows nothing of how proposals travel."""

    def __init__(self, session: Any, items: Sequence[ProposeItem]) -> None:
        """``session``: the stream's sequences; ``items``: where they stand."""
        self._session = session
        self._lanes = {
            one.sequence_id: Lane(one.sequence_id, one.epoch, one.base_len, one.append, one.k)
            for one in items
        }
        self.items: list[ProposeItem] = []
        """What the last turn asked of the engine."""

    @property
    def lanes(self) -> list[Lane]:
        """The sequences, in the grant's order."""
        return list(self._lanes.values())

    def propose(self) -> RoundResult[Proposal]:
        """One proposal for each sequence that is to have one."""
        return self._served(self._session.round)

    def settle(self, found: Sequence[Sequence[int]]) -> RoundResult[Proposal]:
        """``propose`` where the device has: the tokens of each that is to have some."""
        return self._served(lambda items: self._session.settle(items, found))

    def _served(
        self, serve: Callable[[Sequence[ProposeItem]], RoundResult[Proposal]]
    ) -> RoundResult[Proposal]:
        self.items = [lane.item() for lane in self._lanes.values() if lane.k > 0]
        result = serve(self.items)
        for answer in result.answers:
            self._lanes[answer.sequence_id].proposed(answer)
        return result

    def judged(self, verdicts: Sequence[Judgement]) -> None:
        """Takes in the verdicts; raises ``ProtocolError`` for one that can't be."""
        for one in verdicts:
            lane = self._lanes.get(one.sequence_id)
            # Its epoch is the verifier's own, and may be another than the draft's.
            if (
                lane is None
                or one.num_accepted > len(lane.proposal)
                or one.committed_len != lane.log_len + one.num_accepted + 1
            ):
                raise ProtocolError(f"a verdict on what was not proposed: {one}")
            lane.judged(one)


def run(
    session: Any, message: pb.DraftRequest, doorbell: Doorbell | None, control: Control, seen: Seen
) -> Iterator[pb.DraftResponse]:
    """Runs a grant to its end and answers it once."""
    grant = message.grant
    free = FreeDraft(session, wire.read_propose_items(message))
    result: RoundResult[Proposal] = RoundResult()
    steps = 0
    if doorbell is None:
        end = End(EndReason.PEER, f"mailbox {grant.mailbox} is not mapped here")
        yield answer(message, result, end, steps)
        return
    try:
        while True:
            began = time.perf_counter()
            result = free.propose()
            done = time.perf_counter()
            flags = ENDS if result.refusals or control.interrupted else 0
            doorbell.mailbox.write_proposals(
                ProposalHead(
                    grant.id, steps, flags, result.rows, result.model_seconds, done - began
                ),
                result.answers,
            )
            doorbell.ring()
            steps += 1
            seen(steps - 1, free.items, result, began, done)
            if result.refusals:
                end = End(EndReason.REFUSED, result.refusals[0].message)
                break
            if flags:
                end = End(EndReason.REVOKED)
                break
            found = doorbell.await_turn(
                (grant.id, steps - 1),
                doorbell.mailbox.read_verdicts,
                grant.patience_seconds,
                lambda: control.interrupted,
            )
            if found is None:
                leave(doorbell, grant.id, steps)
                end = End(EndReason.REVOKED)
                break
            head, verdicts = found
            if head.flags & ENDS:
                end = End(EndReason.STOPPED)
                break
            free.judged(verdicts)
    except (PeerGone, ProtocolError) as error:
        doorbell.close()
        end = End(EndReason.PEER, str(error))
    yield answer(message, result, end, steps)


def leave(doorbell: Doorbell, grant: int, step: int) -> None:
    """Tells the verifier, whose turn it is, that ``step`` proposals are all."""
    doorbell.mailbox.write_proposals(ProposalHead(grant, step, ENDS), ())
    doorbell.ring()


def answer(
    message: pb.DraftRequest, result: RoundResult[Proposal], end: End, steps: int
) -> pb.DraftResponse:
    """The one answer to a grant; ``result``: of its last round."""
    last = RoundResult[Proposal]([], result.refusals, result.model_seconds, result.rows)
    response = wire.write_draft_response(message.round, last, 0.0)
    response.grant_end.CopyFrom(end_message(message.grant, end, steps))
    return response
