"""The draft's turns, taken by the host: propose, wait for the verdicts, go on from there."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from outrider.draft_service.granted import DraftRounds
from outrider.protos import speculation_pb2 as pb
from outrider.shared.core import wire
from outrider.shared.core.types import Proposal, ProposeItem
from outrider.shared.link.doorbell import Doorbell, PeerGone
from outrider.shared.link.mailbox import ENDS, ProposalHead
from outrider.shared.rounds.grant_loop import Turn
from outrider.shared.rounds.grants import Control, End, EndReason

if TYPE_CHECKING:
    from outrider.shared.rounds.session import Session


class DraftTaker(ABC):
    """What all ways of taking the draft's turns have in common; see ``TurnTaker``."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def taking(self) -> contextlib.AbstractContextManager[None]:
        """See ``TurnTaker``."""
        return contextlib.nullcontext()

    @abstractmethod
    def next(self, step: int) -> Turn | End:
        """See ``TurnTaker``."""

    def end_of(self, turn: Turn) -> End | None:
        """See ``TurnTaker``."""
        if turn.result.refusals:
            return End(EndReason.REFUSED, turn.result.refusals[0].message)
        return End(EndReason.REVOKED) if self._control.interrupted else None

    @abstractmethod
    def hand_over(self, turn: Turn, end: End | None) -> None:
        """See ``TurnTaker``."""


def leave(doorbell: Doorbell, grant: int, step: int) -> None:
    """Tells the verifier, whose turn it is, that ``step`` proposals are all."""
    doorbell.mailbox.write_proposals(ProposalHead(grant, step, ENDS), ())
    with contextlib.suppress(PeerGone):  # it needs no word where it is gone by now
        doorbell.ring()


class DraftHostTurns(DraftTaker):
    """Through the mailbox: wait for its verdicts, write proposals, ring."""

    def __init__(
        self,
        session: Session[ProposeItem, Proposal],
        message: pb.DraftRequest,
        doorbell: Doorbell,
        control: Control,
    ) -> None:
        super().__init__(control)
        self._rounds = DraftRounds(session, wire.read_propose_items(message))
        self._grant, self._doorbell = message.grant, doorbell

    def next(self, step: int) -> Turn | End:
        """See ``TurnTaker``; the first one waits for nobody."""
        if step:
            doorbell, grant = self._doorbell, self._grant
            found = doorbell.await_turn(
                (grant.id, step - 1),
                doorbell.mailbox.read_verdicts,
                grant.patience_seconds,
                lambda: self._control.interrupted,
            )
            if found is None:
                leave(doorbell, grant.id, step)
                return End(EndReason.REVOKED)
            head, verdicts = found
            if head.flags & ENDS:
                return End(EndReason.STOPPED)
            self._rounds.judged(verdicts)
        began = time.perf_counter_ns()
        result = self._rounds.propose()
        return Turn(step, self._rounds.items, result, began, time.perf_counter_ns())

    def hand_over(self, turn: Turn, end: End | None) -> None:
        """See ``TurnTaker``."""
        result, seconds = turn.result, (turn.done - turn.began) / 1e9
        head = ProposalHead(
            self._grant.id, turn.step, 0 if end is None else ENDS, result.rows,
            result.model_seconds, seconds,
        )  # fmt: skip
        self._doorbell.mailbox.write_proposals(head, result.answers)
        self._doorbell.ring()
