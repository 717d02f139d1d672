"""``outrider.v1.Draft``: protos in and out of the draft engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from outrider.draft_service import host_rounds
from outrider.draft_service.host_rounds import DraftHostTurns, DraftTaker
from outrider.protos import speculation_pb2 as pb
from outrider.shared.core import wire
from outrider.shared.core.types import RoundResult
from outrider.shared.rounds import grant_loop
from outrider.shared.rounds.grant_loop import Turn
from outrider.shared.rounds.servicer import RoundsServicer

if TYPE_CHECKING:
    from outrider.shared.link.doorbell import Doorbell
    from outrider.shared.rounds.session import Engine


def _device_turns(*rest: Any) -> DraftTaker:
    # Imported late: torch comes with the model.
    from outrider.draft_service.device_rounds import DraftDeviceTurns

    return DraftDeviceTurns(*rest)


def _prepare_mailbox(engine: Engine[Any, Any], doorbell: Doorbell) -> None:
    from outrider.draft_service.cuda_turns import DraftTurns
    from outrider.shared.rounds.device_turns import prepare

    prepare(engine, doorbell, DraftTurns)


class DraftSide:
    """The draft in a grant, see ``GrantSide``: it answers once, at the end."""

    ways: Mapping[str, grant_loop.TakerOf[pb.DraftRequest, Turn]] = {
        "host": DraftHostTurns,
        "device": _device_turns,
    }

    leave = staticmethod(host_rounds.leave)

    def report(self, message: pb.DraftRequest, turn: Turn) -> None:
        """See ``GrantSide``: the verifier reports each round."""

    def last(self, message: pb.DraftRequest, turn: Turn | None) -> pb.DraftResponse:
        """See ``GrantSide``; with what the last round refused."""
        last: RoundResult[Any] = RoundResult()
        if turn is not None:
            result = turn.result
            last = RoundResult([], result.refusals, result.model_seconds, result.rows)
        return wire.write_draft_response(message.round, last, 0.0)


SIDE = DraftSide()


def make_servicer() -> RoundsServicer:
    """The servicer, still without its engine."""
    return RoundsServicer(
        wire.read_propose_items,
        wire.write_draft_response,
        _run_grant,
        prepare_mailbox=_prepare_mailbox,
    )


def _run_grant(*rest: Any) -> Iterator[pb.DraftResponse]:
    return grant_loop.run(SIDE, *rest)
