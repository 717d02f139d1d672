"""The verifier's turns, taken by the device: the host looks on and keeps the books.

When a turn is done its numbers go into the same books as if the host had asked for them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from outrider.protos import speculation_pb2 as pb
from outrider.shared.core import wire
from outrider.shared.core.types import Proposal, Verdict, VerifyItem
from outrider.shared.link.doorbell import Doorbell, Watch
from outrider.shared.link.mailbox import ENDS, ProposalHead
from outrider.shared.rounds import device_turns
from outrider.shared.rounds.grants import Control, End, EndReason, NotOnDevice
from outrider.verify_service.cuda_turns import VerifyTurns
from outrider.verify_service.granted import VerifyRounds
from outrider.verify_service.host_rounds import VerifyTaker, VerifyTurn, leave

if TYPE_CHECKING:
    from outrider.shared.rounds.session import Session


class VerifyDeviceTurns(VerifyTaker):
    """On the device: look on until its turn is done, queue the next, settle its numbers.

    In this order, since the draft may be done with its turn before the books are kept.
    """

    _turns: VerifyTurns
    _watch: Watch

    def __init__(
        self,
        session: Session[VerifyItem, Verdict],
        message: pb.VerifyRequest,
        doorbell: Doorbell,
        control: Control,
    ) -> None:
        grant = message.grant
        items, self._granted = device_turns.in_order(wire.read_verify_items(message), grant)
        super().__init__(VerifyRounds(session, items, self._granted), control)
        self._session, self._grant, self._doorbell = session, grant, doorbell
        self._queued = True
        self._proposals: int | None = None  # how many there are of them, once the last is known

    @contextmanager
    def taking(self) -> Iterator[None]:
        """See ``TurnTaker``; the engine is the grant's alone."""
        with device_turns.taking(self._session, self._doorbell, VerifyTurns) as self._turns:
            self._watch = Watch(self._doorbell, self._grant.patience_seconds)
            self._catch_up()
            device_turns.start(
                self._turns, self._session, self._grant.id, self._rounds.lanes, self._granted
            )
            yield

    def next(self, step: int) -> VerifyTurn | End:
        """See ``TurnTaker``."""
        if self._in_vain() or not device_turns.look_on(self._turns, self._watch, self._left):
            return End(EndReason.REVOKED, "the draft has left")
        seconds = self._turns.seconds()
        asked, done = self._asked, time.perf_counter_ns()
        self._asked = done
        began = max(asked, done - int(1e9 * seconds))
        found = self._turns.result()
        if any(token < 0 and tokens for tokens, _, token in found):
            # The device stands still there, whatever the rows before have decided.
            raise NotOnDevice("a proposed row's logits are not finite")
        verdicts = [(accepted, token) for _, accepted, token in found]
        self._queued = not self._foreseen(verdicts, [tokens for tokens, _, _ in found])
        if self._queued:
            self._turns.queue()
        proposals = [
            Proposal(lane.sequence_id, lane.epoch, lane.committed_len, tuple(tokens))
            for lane, (tokens, _, _) in zip(self._rounds.lanes, found, strict=True)
            if tokens
        ]
        result = self._rounds.settle(proposals, verdicts)
        result.model_seconds = seconds
        # What the device did not spend on its own turn it waited for the draft's.
        drafting = (began - asked) / 1e9
        head = ProposalHead(self._grant.id, step, 0, 0, drafting, drafting)
        return VerifyTurn(step, self._rounds.items, result, began, done, asked, head)

    def hand_over(self, turn: VerifyTurn, end: End | None) -> None:
        """See ``TurnTaker``: the device has done so; the draft's host is told of the end."""
        if end is None:
            if not self._queued:
                self._turns.queue()
        else:
            leave(self._doorbell, self._grant.id, turn.step + 1)

    def _change(self, ks: Sequence[int]) -> End | None:
        # The device's turns have the K that they began with.
        return End(EndReason.REVOKED)

    def _left(self) -> bool:
        """Takes in the draft's word that it proposes no more; whether the turn waits in vain."""
        found = self._doorbell.mailbox.read_proposals()
        if found is not None and found[0].grant == self._grant.id and found[0].flags & ENDS:
            self._proposals = found[0].step
        return self._in_vain()

    def _in_vain(self) -> bool:
        return self._proposals is not None and self._proposals <= self._turns.turn

    def _catch_up(self) -> None:
        """Takes in all but the pending token."""
        behind = [
            VerifyItem(one.sequence_id, one.epoch, one.base_len, one.append[:-1], extend_only=True)
            for one in self._rounds.lanes
            if len(one.append) > 1
        ]
        device_turns.take_in(self._session, behind)
        for one in self._rounds.lanes:
            one.base_len += len(one.append) - 1
            one.append = one.append[-1:]
