"""The draft's turns, taken by the device: the host looks on and keeps the books.

When a turn is done its numbers go into the same books as if the host had asked for them. The
verifier's last word comes to the host through the mailbox; by then the device may have taken one
turn more, on a verdict that was the last.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from outrider.draft_service.cuda_turns import ROWS, DraftTurns
from outrider.draft_service.granted import DraftRounds
from outrider.draft_service.host_rounds import DraftTaker, leave
from outrider.protos import speculation_pb2 as pb
from outrider.shared.core import wire
from outrider.shared.core.types import Proposal, ProposeItem
from outrider.shared.link.doorbell import Doorbell, Watch
from outrider.shared.link.mailbox import ENDS, Judgement
from outrider.shared.rounds import device_turns
from outrider.shared.rounds.grant_loop import Turn
from outrider.shared.rounds.grants import Control, End, EndReason, next_k

if TYPE_CHECKING:
    from outrider.shared.rounds.session import Session


class DraftDeviceTurns(DraftTaker):
    """On the device: look on until its turn is done, settle its numbers, queue the next."""

    _turns: DraftTurns
    _watch: Watch
    _rounds: DraftRounds

    def __init__(
        self,
        session: Session[ProposeItem, Proposal],
        message: pb.DraftRequest,
        doorbell: Doorbell,
        control: Control,
    ) -> None:
        super().__init__(control)
        self._session, self._grant, self._doorbell = session, message.grant, doorbell
        self._items, self._granted = device_turns.in_order(
            wire.read_propose_items(message), message.grant
        )
        self._verdicts: int | None = None  # how many there are of them, once the last is known

    @contextmanager
    def taking(self) -> Iterator[None]:
        """See ``TurnTaker``; the engine is the grant's alone."""
        session, grant = self._session, self._grant
        with device_turns.taking(session, self._doorbell, DraftTurns) as self._turns:
            self._watch = Watch(self._doorbell, grant.patience_seconds)
            self._rounds = DraftRounds(session, self._caught_up())
            device_turns.start(self._turns, session, grant.id, self._rounds.lanes, self._granted)
            yield

    def next(self, step: int) -> Turn | End:
        """See ``TurnTaker``."""
        if not device_turns.look_on(self._turns, self._watch, self._over):
            return End(EndReason.STOPPED)
        if self._doorbell.rung():
            self._over()
        seconds = self._turns.seconds()
        done = time.perf_counter_ns()
        if step and not self._follow():
            return End(EndReason.STOPPED)
        lanes = self._rounds.lanes
        proposed = self._turns.result()
        result = self._rounds.settle(
            [row[: lane.k] for lane, row in zip(lanes, proposed, strict=True) if lane.k]
        )
        result.model_seconds = seconds
        return Turn(step, self._rounds.items, result, done - int(1e9 * seconds), done)

    def end_of(self, turn: Turn) -> End | None:
        """See ``TurnTaker``: the verifier's last word may be here already."""
        end = super().end_of(turn)
        return End(EndReason.STOPPED) if end is None and self._verdicts is not None else end

    def hand_over(self, turn: Turn, end: End | None) -> None:
        """See ``TurnTaker``: the device has done so; the verifier's host is told of the end."""
        if end is None:
            self._turns.queue()
        elif self._verdicts is None:
            leave(self._doorbell, self._grant.id, turn.step + 1)

    def _follow(self) -> bool:
        """Takes in the verdicts that the turn began with; False where one ended its sequence."""
        verdicts = self._turns.verdicts()
        if not all(goes_on for _, _, _, goes_on in verdicts):
            return False
        self._rounds.judged(
            [
                Judgement(
                    lane.sequence_id, lane.epoch, accepted, token, committed,
                    next_k(one.k, one.limit, committed),
                )
                for lane, one, (accepted, token, committed, _) in zip(
                    self._rounds.lanes, self._granted, verdicts, strict=True
                )
            ]
        )  # fmt: skip
        return True

    def _over(self) -> bool:
        """Takes in the verifier's last word; whether the queued turn waits in vain."""
        found = self._doorbell.mailbox.read_verdicts()
        if found is not None and found[0].grant == self._grant.id and found[0].flags & ENDS:
            self._verdicts = found[0].step
        return self._verdicts is not None and self._turns.turn > self._verdicts

    def _caught_up(self) -> list[ProposeItem]:
        """Takes in all but the last two tokens, which a turn forwards itself."""
        behind = [
            replace(one, append=one.append[:-ROWS], k=0)
            for one in self._items
            if len(one.append) > ROWS
        ]
        device_turns.take_in(self._session, behind)
        return [
            replace(
                one,
                base_len=one.base_len + max(len(one.append) - ROWS, 0),
                append=one.append[-ROWS:],
            )
            for one in self._items
        ]
