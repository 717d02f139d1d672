"""The verifier's turns, taken by the host: through shared memory, or without a draft at all.

The verifier is the master of the grant: it counts the rounds, watches limits and stop tokens, and
tells the coordinator of each round while the draft already works on the next one.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outrider.protos import speculation_pb2 as pb
from outrider.shared.core import wire
from outrider.shared.core.types import Proposal, Verdict, VerifyItem
from outrider.shared.link.doorbell import Doorbell, PeerGone
from outrider.shared.link.mailbox import ENDS, ProposalHead, VerdictHead
from outrider.shared.rounds.grant_loop import Turn
from outrider.shared.rounds.grants import Control, End, EndReason
from outrider.verify_service.granted import VerifyRounds

if TYPE_CHECKING:
    from outrider.shared.rounds.session import Session


@dataclass(slots=True)
class VerifyTurn(Turn):
    """A turn of the verifier."""

    asked: int
    """When it began to wait for the draft, at first for the coordinator."""
    head: ProposalHead | None
    """What the draft said of its own turn; None where nothing is drafted."""


class VerifyTaker(ABC):
    """What all ways of taking the verifier's turns have in common; see ``TurnTaker``."""

    def __init__(self, rounds: VerifyRounds, control: Control) -> None:
        self._rounds, self._control = rounds, control
        self._asked = time.perf_counter_ns()

    def taking(self) -> contextlib.AbstractContextManager[None]:
        """See ``TurnTaker``."""
        return contextlib.nullcontext()

    @abstractmethod
    def next(self, step: int) -> VerifyTurn | End:
        """See ``TurnTaker``."""

    def end_of(self, turn: VerifyTurn) -> End | None:
        """See ``TurnTaker``."""
        rounds, ks = self._control.step()
        if turn.result.refusals:
            return End(EndReason.REFUSED, turn.result.refusals[0].message)
        if self._rounds.stopped:
            return End(EndReason.STOPPED)
        if self._control.interrupted or (turn.head is not None and turn.head.flags & ENDS):
            return End(EndReason.REVOKED)
        if rounds <= 0:
            return End(EndReason.CREDITS)
        return self._change(ks) if ks else None

    @abstractmethod
    def hand_over(self, turn: VerifyTurn, end: End | None) -> None:
        """See ``TurnTaker``."""

    def _change(self, ks: Sequence[int]) -> End | None:
        """Takes over new Ks, or ends the grant for them."""
        self._rounds.change(ks)
        return None

    def _foreseen(
        self, found: Sequence[tuple[int, int]], proposals: Sequence[Sequence[int]]
    ) -> bool:
        """Whether a turn that found (accepted, next token) is plainly the last one, before anything
        of it is in the books."""
        return self._control.ending or any(
            token < 0 or lane.ends(accepted, token, proposal)
            for (accepted, token), proposal, lane in zip(
                found, proposals, self._rounds.lanes, strict=True
            )
        )

    def _judge(
        self, step: int, head: ProposalHead | None, proposals: Sequence[Proposal]
    ) -> VerifyTurn:
        began = time.perf_counter_ns()
        result = self._rounds.judge(proposals)
        return VerifyTurn(step, self._rounds.items, result, began, 0, self._asked, head)

    def _done(self, turn: VerifyTurn) -> None:
        turn.done = self._asked = time.perf_counter_ns()


def leave(doorbell: Doorbell, grant: int, step: int) -> None:
    """The verifier's last word to the draft, in place of the verdicts of ``step``."""
    doorbell.mailbox.write_verdicts(VerdictHead(grant, step, ENDS), ())
    with contextlib.suppress(PeerGone):  # it needs no word where it is gone by now
        doorbell.ring()


class AloneTurns(VerifyTaker):
    """Without a draft: every turn decodes one token of each sequence."""

    def __init__(
        self,
        session: Session[VerifyItem, Verdict],
        message: pb.VerifyRequest,
        doorbell: Doorbell | None,
        control: Control,
    ) -> None:
        items = wire.read_verify_items(message)
        super().__init__(VerifyRounds(session, items, message.grant.sequences), control)

    def next(self, step: int) -> VerifyTurn:
        """See ``TurnTaker``; nobody is waited for."""
        return self._judge(step, None, ())

    def hand_over(self, turn: VerifyTurn, end: End | None) -> None:
        """See ``TurnTaker``; nobody is told."""
        self._done(turn)


class VerifyHostTurns(VerifyTaker):
    """Through the mailbox: wait for its proposals, judge them, write the verdicts, ring."""

    def __init__(
        self,
        session: Session[VerifyItem, Verdict],
        message: pb.VerifyRequest,
        doorbell: Doorbell,
        control: Control,
    ) -> None:
        items = wire.read_verify_items(message)
        super().__init__(VerifyRounds(session, items, message.grant.sequences), control)
        self._grant, self._doorbell = message.grant, doorbell

    def next(self, step: int) -> VerifyTurn | End:
        """See ``TurnTaker``."""
        doorbell, grant = self._doorbell, self._grant
        found = doorbell.await_turn(
            (grant.id, step), doorbell.mailbox.read_proposals, grant.patience_seconds
        )
        assert found is not None  # nothing interrupts this wait but the draft's ring
        head, proposals = found
        if head.flags & ENDS and not proposals:
            return End(EndReason.REFUSED, "the draft has nothing to propose")
        return self._judge(step, head, proposals)

    def hand_over(self, turn: VerifyTurn, end: End | None) -> None:
        """See ``TurnTaker``."""
        head = VerdictHead(self._grant.id, turn.step, 0 if end is None else ENDS)
        result = turn.result
        judgements = [] if result.refusals else self._rounds.judgements(result.answers)
        self._doorbell.mailbox.write_verdicts(head, judgements)
        self._done(turn)
        self._doorbell.ring()
