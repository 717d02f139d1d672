"""A grant as a service runs it: turn after turn until its end, over whatever link.

Written once, for both services. How a turn is taken is a ``TurnTaker``'s, one class for each way
of ``shared.core.links``; what is particular to draft or verifier is its ``GrantSide``'s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from outrider.protos import speculation_pb2 as pb
from outrider.shared.core.errors import ProtocolError, SequenceRefused
from outrider.shared.core.links import LINKS
from outrider.shared.core.types import RoundResult
from outrider.shared.link.doorbell import Doorbell, PeerGone, PeerLate
from outrider.shared.rounds.grants import Control, End, EndReason, NotOnDevice, end_message

if TYPE_CHECKING:
    from outrider.shared.rounds.session import Session

log = logging.getLogger(__name__)

Seen = Callable[[int, Sequence[Any], RoundResult[Any], float, float], None]
"""Step, items, result, and when it began and was done by ``time.perf_counter``."""


@dataclass(slots=True)
class Turn:
    """One turn of this side; times are nanoseconds of ``time.perf_counter_ns``."""

    step: int
    """Of the grant, from 0."""
    items: Sequence[Any]
    result: RoundResult[Any]
    began: int
    done: int


TurnT = TypeVar("TurnT", bound=Turn)
MessageT = TypeVar("MessageT", pb.DraftRequest, pb.VerifyRequest)
ResponseT = TypeVar("ResponseT", pb.DraftResponse, pb.VerifyResponse)
MessageInT = TypeVar("MessageInT", pb.DraftRequest, pb.VerifyRequest, contravariant=True)
ResponseOutT = TypeVar("ResponseOutT", pb.DraftResponse, pb.VerifyResponse, covariant=True)


class TurnTaker(Protocol[TurnT]):
    """Takes one side's turns of one grant.

    Each of these may raise ``PeerGone`` or ``PeerLate`` for the other side, ``ProtocolError`` and
    ``SequenceRefused`` for what does not fit, ``NotOnDevice`` where the hosts are to do it.
    """

    def taking(self) -> AbstractContextManager[None]:
        """Entered before the first turn and left after the last one, however that ended."""
        ...

    def next(self, step: int) -> TurnT | End:
        """Waits for the other side's turn and takes this one; the end where there is none."""
        ...

    def end_of(self, turn: TurnT) -> End | None:
        """Why this turn is the last one; None where another follows. Asked once a turn."""
        ...

    def hand_over(self, turn: TurnT, end: End | None) -> None:
        """Gives what came of the turn to the other side, with the last word where it is that."""
        ...


class GrantSide(Protocol[MessageInT, ResponseOutT, TurnT]):
    """What the loop has to know of the service that it runs in."""

    @property
    def ways(self) -> Mapping[str, TakerOf[MessageInT, TurnT]]:
        """Who takes the turns, by ``Link.way``."""
        ...

    def leave(self, doorbell: Doorbell, grant: int, step: int) -> None:
        """This side's last word to the other one, in place of what ``step`` would have brought."""
        ...

    def report(self, message: MessageInT, turn: TurnT) -> ResponseOutT | None:
        """What the coordinator is told of a turn; None where it is told of the end alone."""
        ...

    def last(self, message: MessageInT, turn: TurnT | None) -> ResponseOutT:
        """What it is told at the end, where no report says it; ``turn``: the last one."""
        ...


TakerOf = Callable[["Session[Any, Any]", MessageT, Any, Control], TurnTaker[TurnT]]
"""Makes the taker: of the stream's sequences, the message that brought the grant, the doorbell
(None only for a way over links that share nothing), and the coordinator's word."""


def run(
    side: GrantSide[MessageT, ResponseT, TurnT],
    session: Session[Any, Any],
    message: MessageT,
    doorbell: Doorbell | None,
    control: Control,
    seen: Seen,
) -> Generator[ResponseT, None, None]:
    """Runs a grant to its end and answers it; the last answer says that it is the last."""
    grant = message.grant
    turn: TurnT | None = None
    end: End | None = None
    steps, told = 0, False
    try:
        taker = _taker(side, session, message, doorbell, control)
        with taker.taking(), _letting_go(doorbell, lambda: end is not None):
            while end is None:
                found = taker.next(steps)
                if isinstance(found, End):
                    end = found
                    break
                turn = found
                ending = taker.end_of(turn)
                taker.hand_over(turn, ending)
                end = ending
                steps += 1
                response = side.report(message, turn)
                if response is not None:
                    if end is not None:
                        response.grant_end.CopyFrom(end_message(grant, end, steps))
                        told = True
                    yield response
                seen(turn.step, turn.items, turn.result, turn.began / 1e9, turn.done / 1e9)
    except NotOnDevice as error:
        log.info("the hosts take the turns of grant %d: %s", grant.id, error)
        end = _left(side, doorbell, grant, steps, End(EndReason.HOST, str(error)))
    except PeerLate as error:
        end = _left(side, doorbell, grant, steps, End(EndReason.LATE, str(error)))
    except (PeerGone, ProtocolError, SequenceRefused) as error:
        end = End(EndReason.PEER, str(error))
    finally:
        if doorbell is not None and (end is None or end.reason is EndReason.PEER):
            doorbell.close()
    if not told:
        response = side.last(message, turn)
        response.grant_end.CopyFrom(end_message(grant, end, steps))
        yield response


def _taker(
    side: GrantSide[MessageT, ResponseT, TurnT],
    session: Session[Any, Any],
    message: MessageT,
    doorbell: Doorbell | None,
    control: Control,
) -> TurnTaker[TurnT]:
    """Who takes the grant's turns: that says its link."""
    grant = message.grant
    link = LINKS.get(grant.link)
    if link is None or link.way not in side.ways:
        raise ProtocolError(f"a grant over the link {grant.link!r}")
    if link.carrier and doorbell is None:
        raise PeerGone(f"mailbox {grant.mailbox} is not mapped here")
    return side.ways[link.way](session, message, doorbell, control)


@contextmanager
def _letting_go(doorbell: Doorbell | None, over: Callable[[], bool]) -> Iterator[None]:
    """Has the other side know when the turns broke off before their end: the coordinator is gone.

    Before anything else is done about them: a device's turn that is let go of looks to the other
    side like the last one.
    """
    try:
        yield
    except (NotOnDevice, PeerLate):
        raise  # these end with a last word
    except BaseException:
        if doorbell is not None and not over():
            doorbell.close()
        raise


def _left(
    side: GrantSide[Any, Any, Any], doorbell: Doorbell | None, grant: pb.Grant, steps: int, end: End
) -> End:
    """Has the other side not wait for a turn that this one does not take."""
    if doorbell is not None:
        side.leave(doorbell, grant.id, steps)
    return end
