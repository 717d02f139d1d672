"""``outrider.v1.Verify``: protos in and out of the verify engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from outrider.protos import speculation_pb2 as pb
from outrider.shared.core import wire
from outrider.shared.core.links import LINKS
from outrider.shared.rounds.servicer import RoundsServicer
from outrider.verify_service import host_rounds
from outrider.verify_service.prefetch import ahead

REPORTS_AHEAD = 16
"""Rounds that a grant may be ahead of what the coordinator has been told."""


def make_servicer() -> RoundsServicer:
    """The servicer, still without its engine."""
    return RoundsServicer(wire.read_verify_items, wire.write_verify_response, _run_grant)


def _run_grant(session: Any, message: pb.VerifyRequest, *rest: Any) -> Iterator[pb.VerifyResponse]:
    if LINKS[message.grant.link].way == "device":
        # Imported late: torch comes with the model.
        from outrider.verify_service import device_rounds

        return ahead(device_rounds.run(session, message, *rest), REPORTS_AHEAD)
    return ahead(host_rounds.run(session, message, *rest), REPORTS_AHEAD)
