"""The verifier's turns without a draft, taken by the device.

The device takes the next turn while the host keeps the books of the last one. With few sequences
the next turn is queued before the last one is done, and the device is never idle. Where many run,
some sequence stops every few rounds, and a turn that was queued ahead is in vain then: there the
tokens are read first. Between turns the engine is everybody's: what others ask of it runs in the
order of the model's stream.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from outrider.protos import speculation_pb2 as pb
from outrider.shared.core import wire
from outrider.shared.core.errors import SequenceRefused
from outrider.shared.core.types import Verdict, VerifyItem
from outrider.shared.link.doorbell import Doorbell
from outrider.shared.model.cuda.turns.turns import TurnSequence
from outrider.shared.rounds.device_turns import rehearse
from outrider.shared.rounds.grants import Control, End, EndReason
from outrider.verify_service.cuda_turns import AloneVerifyTurns
from outrider.verify_service.granted import VerifyLane, VerifyRounds
from outrider.verify_service.host_rounds import AloneTurns, VerifyTaker, VerifyTurn

if TYPE_CHECKING:
    from outrider.shared.rounds.session import Held, Session

FEW = 8
"""Sequences up to which a turn is queued before the one before it is done."""


def prepare(session: Session[VerifyItem, Verdict]) -> None:
    """Makes and rehearses the turns of a stream's rounds without a draft; the runner has turns."""
    session.alone = AloneVerifyTurns.of(session.engine.runner)
    rehearse(session.engine, session.alone)


def trial(session: Session[VerifyItem, Verdict], items: Sequence[VerifyItem]) -> float | None:
    """Seconds of one turn over ``items``, which bring a token each; None where there is none.

    Turns follow one another without a gap, so the device's time is all.
    """
    if session.alone is None:
        session.alone = AloneVerifyTurns.of(session.engine.runner)
    turns: AloneVerifyTurns = session.alone
    sequences = []
    for item in items:
        held = session.held(item.sequence_id)
        sequences.append(
            _turn_sequence(held, item.append[-1], item.base_len + 1, held.extent.capacity)
        )
    if turns.why_not(sequences) is not None:
        return None
    with session.engine.lock, torch.inference_mode():
        turns.start(0, sequences)
        turns.queue()
        _, seconds = turns.take()
    return seconds


def alone_turns(
    session: Session[VerifyItem, Verdict],
    message: pb.VerifyRequest,
    doorbell: Doorbell | None,
    control: Control,
) -> VerifyTaker:
    """Who takes the turns of a grant without a draft: the device where it can, else the host."""
    if session.alone is not None:
        taker = AloneDeviceTurns(session, session.alone, message, control)
        if taker.possible():
            return taker
    return AloneTurns(session, message, doorbell, control)


class AloneDeviceTurns(VerifyTaker):
    """On the device: wait for a turn, queue the next, keep the books."""

    def __init__(
        self,
        session: Session[VerifyItem, Verdict],
        turns: AloneVerifyTurns,
        message: pb.VerifyRequest,
        control: Control,
    ) -> None:
        items = wire.read_verify_items(message)
        super().__init__(VerifyRounds(session, items, message.grant.sequences), control)
        self._session, self._turns, self._grant = session, turns, message.grant
        self._ahead = turns.MOST_UNDER_WAY if len(items) <= FEW else 1

    def possible(self) -> bool:
        """Whether the device can take these turns."""
        try:
            return self._turns.why_not([self._sequence(one) for one in self._rounds.lanes]) is None
        except SequenceRefused:
            return False  # the host's first round says so

    @contextmanager
    def taking(self) -> Iterator[None]:
        """See ``TurnTaker``; none is left queued behind, for its sequences may be closed next."""
        self._catch_up()
        with self._session.engine.lock, torch.inference_mode():
            self._turns.start(self._grant.id, [self._sequence(one) for one in self._rounds.lanes])
        try:
            self._queue(self._ahead)
            yield
        finally:
            self._turns.drop()

    def next(self, step: int) -> VerifyTurn:
        """See ``TurnTaker``; nobody is waited for."""
        self._queue(1)  # where the host had foreseen an end that did not come
        found, seconds = self._turns.take()
        asked, done = self._asked, time.perf_counter_ns()
        self._asked = done
        if not self._foreseen(found, [()] * len(found)):
            self._queue(self._ahead, taken=1)
        result = self._rounds.settle((), found)
        result.model_seconds = seconds
        began = max(asked, done - int(1e9 * seconds))
        return VerifyTurn(step, self._rounds.items, result, began, done, asked, None)

    def end_of(self, turn: VerifyTurn) -> End | None:
        """See ``TurnTaker``; a turn that is under way when the grant is revoked still counts."""
        end = super().end_of(turn)
        if end is not None and end.reason is EndReason.REVOKED and self._turns.under_way:
            return None
        return end

    def hand_over(self, turn: VerifyTurn, end: End | None) -> None:
        """See ``TurnTaker``; nobody is told."""

    def _queue(self, count: int, taken: int = 0) -> None:
        """Sees to it that so many turns are under way, but none behind one that ends a sequence.

        ``taken``: turns that are not in the books yet.
        """
        left = min(lane.limit - lane.committed_len for lane in self._rounds.lanes) - taken
        while self._turns.under_way < min(count, max(left, 1)):
            with self._session.engine.lock, torch.inference_mode():
                self._turns.queue()

    def _sequence(self, lane: VerifyLane) -> TurnSequence:
        held = self._session.held(lane.sequence_id)
        return _turn_sequence(held, lane.append[-1], lane.committed_len, lane.limit)

    def _catch_up(self) -> None:
        """Takes in all but the pending token; what is refused, the books of a turn will say."""
        behind = [
            VerifyItem(one.sequence_id, one.epoch, one.base_len, one.append[:-1], extend_only=True)
            for one in self._rounds.lanes
            if len(one.append) > 1
        ]
        if behind:
            self._session.round(behind)
        for one in self._rounds.lanes:
            one.base_len, one.append = one.committed_len - 1, one.append[-1:]


def _turn_sequence(held: Held, pending: int, committed_len: int, limit: int) -> TurnSequence:
    """Where a sequence stands, for which nothing is proposed."""
    return TurnSequence(held.extent, held.decoding, 0, pending, committed_len, 0, limit)
