"""The draft's half of rounds whose turns the device takes: the host looks on.

The bookkeeping is that of ``host_rounds``: when a turn is done, its numbers go the way they
would have gone had the host asked for them. The verifier's last word comes to the host through
the mailbox; by then the device may have taken one turn more, on a verdict that was the last.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from outrider.draft_service.cuda_turns import DraftTurns
from outrider.draft_service.host_rounds import FreeDraft, Seen, answer, leave
from outrider.protos import speculation_pb2 as pb
from outrider.shared.core import wire
from outrider.shared.core.errors import ProtocolError, SequenceRefused
from outrider.shared.core.types import Proposal, ProposeItem, RoundResult
from outrider.shared.link.doorbell import Doorbell, PeerGone, Watch
from outrider.shared.link.mailbox import ENDS, Judgement
from outrider.shared.rounds import device_turns
from outrider.shared.rounds.device_turns import NotOnDevice
from outrider.shared.rounds.grants import Control, End, EndReason, next_k

log = logging.getLogger(__name__)


def run(
    session: Any, message: pb.DraftRequest, doorbell: Doorbell | None, control: Control, seen: Seen
) -> Iterator[pb.DraftResponse]:
    """Runs a grant to its end and answers it once."""
    grant = message.grant
    result: RoundResult[Proposal] = RoundResult()
    steps = 0
    try:
        with (
            device_turns.turns_of(session, doorbell, DraftTurns) as turns,
            device_turns.left_in_order(turns),
        ):
            assert doorbell is not None
            watch = Watch(doorbell, grant.patience_seconds)
            rounds = _Rounds(session, message, turns, watch)
            while rounds.taken():
                found = rounds.next()
                if found is None:
                    break
                result = found
                steps += 1
                seen(steps - 1, rounds.free.items, result, rounds.began, rounds.done)
                if result.refusals or control.interrupted:
                    leave(doorbell, grant.id, steps)
                    break
                if rounds.verdicts is not None:
                    break
                turns.queue()
            if result.refusals:
                end = End(EndReason.REFUSED, result.refusals[0].message)
            else:
                end = End(EndReason.REVOKED if control.interrupted else EndReason.STOPPED)
    except NotOnDevice as error:
        log.info("the hosts take the turns of grant %d: %s", grant.id, error)
        end = End(EndReason.HOST, str(error))
        if doorbell is not None:
            with contextlib.suppress(PeerGone):
                leave(doorbell, grant.id, 0)
    except (PeerGone, ProtocolError, SequenceRefused) as error:
        end = End(EndReason.PEER, str(error))
        if doorbell is not None:
            doorbell.close()
    yield answer(message, result, end, steps)


class _Rounds:
    """The grant's turns and what the host keeps of them."""

    def __init__(
        self, session: Any, message: pb.DraftRequest, turns: DraftTurns, watch: Watch
    ) -> None:
        grant = message.grant
        items, self._granted = device_turns.in_order(wire.read_propose_items(message), grant)
        self.began = self.done = 0.0
        self.verdicts: int | None = None
        """How many there are of them, once the last one is known."""
        self._session, self._turns, self._watch, self._grant = session, turns, watch, grant.id
        self.free = FreeDraft(session, [self._caught_up(item) for item in items])
        device_turns.start(turns, session, grant.id, self.free.lanes, self._granted)

    def taken(self) -> bool:
        """Waits for the queued turn; False where the grant is over before it."""
        if not device_turns.look_on(self._turns, self._watch, self._over):
            return False
        if self._watch.doorbell.rung():
            self._over()
        return True

    def next(self) -> RoundResult[Proposal] | None:
        """The proposals of the turn that was taken; None where it had nothing to follow."""
        seconds = self._turns.seconds()
        self.done = time.perf_counter()
        self.began = self.done - seconds
        lanes = self.free.lanes
        if self._turns.turn:
            verdicts = self._turns.verdicts()
            if not all(goes_on for _, _, _, goes_on in verdicts):
                return None  # a sequence came to its end, and with it the grant
            self.free.judged(
                [
                    Judgement(
                        lane.sequence_id, lane.epoch, accepted, token, committed,
                        next_k(one.k, one.limit, committed),
                    )
                    for lane, one, (accepted, token, committed, _) in zip(
                        lanes, self._granted, verdicts, strict=True
                    )
                ]
            )  # fmt: skip
        proposed = self._turns.result()
        wanted = [row[: lane.k] for lane, row in zip(lanes, proposed, strict=True) if lane.k]
        result = self.free.settle(wanted)
        result.model_seconds = seconds
        return result

    def _over(self) -> bool:
        """Takes in the verifier's last word; whether the queued turn waits in vain."""
        found = self._watch.doorbell.mailbox.read_verdicts()
        if found is not None and found[0].grant == self._grant and found[0].flags & ENDS:
            self.verdicts = found[0].step
        return self.verdicts is not None and self._turns.turn > self.verdicts

    def _caught_up(self, item: ProposeItem) -> ProposeItem:
        """Takes in all but the pending token."""
        if len(item.append) < 2:
            return item
        device_turns.take_in(self._session, [replace(item, append=item.append[:-1], k=0)])
        return replace(item, base_len=item.base_len + len(item.append) - 1, append=item.append[-1:])
