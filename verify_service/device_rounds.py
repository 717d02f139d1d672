"""The verifier's half of rounds whose turns the device takes: the host looks on and reports.

The bookkeeping is that of ``host_rounds``: when a turn is done, its numbers go the way they
would have gone had the host asked for them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator
from typing import Any

from outrider.protos import speculation_pb2 as pb
from outrider.shared.core import wire
from outrider.shared.core.errors import ProtocolError, SequenceRefused
from outrider.shared.core.types import Proposal, RoundResult, Verdict, VerifyItem
from outrider.shared.link.doorbell import Doorbell, PeerGone, PeerLate, Watch
from outrider.shared.link.mailbox import ENDS, ProposalHead
from outrider.shared.rounds import device_turns
from outrider.shared.rounds.device_turns import NotOnDevice
from outrider.shared.rounds.grants import Control, End, EndReason, end_message
from outrider.verify_service.cuda_turns import VerifyTurns
from outrider.verify_service.host_rounds import NO_HEAD, FreeVerify, Seen, end_of, report, tell_end

log = logging.getLogger(__name__)


def run(
    session: Any, message: pb.VerifyRequest, doorbell: Doorbell | None, control: Control, seen: Seen
) -> Generator[pb.VerifyResponse, None, None]:
    """Runs a grant to its end; an answer a round, the last one saying that it is the last."""
    grant = message.grant
    steps = 0
    whole = False
    try:
        with (
            device_turns.turns_of(session, doorbell, VerifyTurns) as turns,
            device_turns.left_in_order(turns),
        ):
            assert doorbell is not None
            rounds = _Rounds(session, message, turns, Watch(doorbell, grant.patience_seconds))
            end: End | None = None
            while end is None:
                result = rounds.next()
                if result is None:
                    end = End(EndReason.REVOKED, "the draft has left")
                    break
                left, ks = control.step()
                end = end_of(rounds.free, result, NO_HEAD, left, control)
                if end is None and ks:
                    # The device's turns have the K that they began with.
                    end = End(EndReason.REVOKED)
                if end is None:
                    turns.queue()
                else:
                    tell_end(doorbell, grant.id, steps + 1)
                response = rounds.report(message.round, steps, result)
                steps += 1
                if end is not None:
                    response.grant_end.CopyFrom(end_message(grant, end, steps))
                    whole = True
                yield response
                seen(steps - 1, rounds.free.items, result, rounds.began / 1e9, rounds.done / 1e9)
        if not whole:
            whole = True
            yield pb.VerifyResponse(round=message.round, grant_end=end_message(grant, end, steps))
    except (NotOnDevice, PeerLate) as error:
        whole = True
        late = isinstance(error, PeerLate)
        if not late:
            log.info("the hosts take the turns of grant %d: %s", grant.id, error)
        end = End(EndReason.LATE if late else EndReason.HOST, str(error))
        if doorbell is not None:
            tell_end(doorbell, grant.id, steps)
        yield pb.VerifyResponse(round=message.round, grant_end=end_message(grant, end, steps))
    except (PeerGone, ProtocolError, SequenceRefused) as error:
        end = End(EndReason.PEER, str(error))
        yield pb.VerifyResponse(round=message.round, grant_end=end_message(grant, end, steps))
    finally:
        # Also where the coordinator is gone in mid-grant: the draft is not to wait for us.
        if doorbell is not None and not whole:
            doorbell.close()


class _Rounds:
    """The grant's turns and what the host keeps of them."""

    def __init__(
        self, session: Any, message: pb.VerifyRequest, turns: VerifyTurns, watch: Watch
    ) -> None:
        grant = message.grant
        items, granted = device_turns.in_order(wire.read_verify_items(message), grant)
        self.free = FreeVerify(session, items, granted)
        self.asked = self.began = self.done = time.perf_counter_ns()
        self._session, self._turns, self._watch, self._grant = session, turns, watch, grant.id
        self._proposals: int | None = None  # how many there are of them, once the last is known
        self._catch_up()
        device_turns.start(turns, session, grant.id, self.free.lanes, granted)

    def next(self) -> RoundResult[Verdict] | None:
        """The verdicts of the turn that is queued; None where the draft has left before it."""
        if self._in_vain() or not device_turns.look_on(self._turns, self._watch, self._left):
            return None
        seconds = self._turns.seconds()
        self.asked, before = self.done, self.done
        self.done = time.perf_counter_ns()
        self.began = max(before, self.done - int(1e9 * seconds))
        found = self._turns.result()
        proposals = [
            Proposal(lane.sequence_id, lane.epoch, lane.committed_len, tuple(tokens))
            for lane, (tokens, _, _) in zip(self.free.lanes, found, strict=True)
            if tokens
        ]
        verdicts = [(accepted, token) for _, accepted, token in found]
        result = self.free.settle(proposals, verdicts)
        result.model_seconds = seconds
        return result

    def report(self, number: int, step: int, result: RoundResult[Verdict]) -> pb.VerifyResponse:
        """What the coordinator is told of the round."""
        # What the device did not spend on its own turn it waited for the draft's.
        drafting = (self.began - self.asked) / 1e9
        head = ProposalHead(0, step, 0, 0, drafting, drafting)
        return report(number, step, self.free, result, head, (self.asked, self.began, self.done))

    def _left(self) -> bool:
        """Takes in the draft's word that it proposes no more; whether the turn waits in vain."""
        found = self._watch.doorbell.mailbox.read_proposals()
        if found is not None and found[0].grant == self._grant and found[0].flags & ENDS:
            self._proposals = found[0].step
        return self._in_vain()

    def _in_vain(self) -> bool:
        return self._proposals is not None and self._proposals <= self._turns.turn

    def _catch_up(self) -> None:
        """Takes in all but the pending token."""
        behind = [
            VerifyItem(one.sequence_id, one.epoch, one.base_len, one.append[:-1], extend_only=True)
            for one in self.free.lanes
            if len(one.append) > 1
        ]
        device_turns.take_in(self._session, behind)
        for one in self.free.lanes:
            one.base_len += len(one.append) - 1
            one.append = one.append[-1:]
