"""``outrider.v1.Verify``: protos in and out of the verify engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from outrider.protos import speculation_pb2 as pb
from outrider.shared.core import wire
from outrider.shared.rounds import grant_loop
from outrider.shared.rounds.servicer import RoundsServicer
from outrider.verify_service import host_rounds
from outrider.verify_service.host_rounds import VerifyHostTurns, VerifyTaker, VerifyTurn
from outrider.verify_service.prefetch import ahead

if TYPE_CHECKING:
    from outrider.shared.link.doorbell import Doorbell
    from outrider.shared.rounds.session import Engine, Session

REPORTS_AHEAD = 16
"""Rounds that a grant may be ahead of what the coordinator has been told."""


def _alone_turns(*rest: Any) -> VerifyTaker:
    # Imported late: torch comes with the model.
    from outrider.verify_service.alone_rounds import alone_turns

    return alone_turns(*rest)


def _device_turns(*rest: Any) -> VerifyTaker:
    from outrider.verify_service.device_rounds import VerifyDeviceTurns

    return VerifyDeviceTurns(*rest)


def _prepare_stream(session: Session[Any, Any]) -> None:
    # Imported here, where nobody waits for a token meanwhile.
    from outrider.verify_service.alone_rounds import prepare

    if hasattr(session.engine.runner, "turns"):
        prepare(session)


def _prepare_mailbox(engine: Engine[Any, Any], doorbell: Doorbell) -> None:
    from outrider.shared.rounds.device_turns import prepare
    from outrider.verify_service.cuda_turns import VerifyTurns

    prepare(engine, doorbell, VerifyTurns)


class VerifySide:
    """The verifier in a grant, see ``GrantSide``: it reports each round."""

    ways: Mapping[str, grant_loop.TakerOf[pb.VerifyRequest, VerifyTurn]] = {
        "alone": _alone_turns,
        "host": VerifyHostTurns,
        "device": _device_turns,
    }

    leave = staticmethod(host_rounds.leave)

    def report(self, message: pb.VerifyRequest, turn: VerifyTurn) -> pb.VerifyResponse:
        """See ``GrantSide``."""
        seconds = (turn.done - turn.began) / 1e9
        response = wire.write_verify_response(message.round, turn.result, seconds)
        report = response.granted
        report.step = turn.step
        for item in turn.items:
            report.proposals.add(
                sequence_id=item.sequence_id,
                epoch=item.epoch,
                committed_len=item.base_len + len(item.append),
                tokens=item.proposal,
            )
        head = turn.head
        if head is not None:
            report.draft.model_seconds = head.model_seconds
            report.draft.service_seconds = head.service_seconds
            report.draft.rows = head.rows
            # At first it began by itself, and perhaps sooner than the verifier.
            by_itself = turn.began - int(head.service_seconds * 1e9)
            report.draft_asked_ns = min(turn.asked, by_itself)
            report.draft_answered_ns = turn.began
        report.verify_asked_ns, report.verify_answered_ns = turn.began, turn.done
        return response

    def last(self, message: pb.VerifyRequest, turn: VerifyTurn | None) -> pb.VerifyResponse:
        """See ``GrantSide``."""
        return pb.VerifyResponse(round=message.round)


SIDE = VerifySide()


def make_servicer() -> RoundsServicer:
    """The servicer, still without its engine."""
    return RoundsServicer(
        wire.read_verify_items,
        wire.write_verify_response,
        _run_grant,
        prepare_stream=_prepare_stream,
        prepare_mailbox=_prepare_mailbox,
    )


def _run_grant(*rest: Any) -> Iterator[pb.VerifyResponse]:
    return ahead(grant_loop.run(SIDE, *rest), REPORTS_AHEAD)
