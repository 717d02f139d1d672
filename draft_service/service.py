"""``outrider.v1.Draft``: protos in and out of the draft engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from outrider.draft_service import host_rounds
from outrider.protos import speculation_pb2 as pb
from outrider.shared.core import wire
from outrider.shared.core.links import LINKS
from outrider.shared.rounds.servicer import RoundsServicer


def make_servicer() -> RoundsServicer:
    """The servicer, still without its engine."""
    return RoundsServicer(wire.read_propose_items, wire.write_draft_response, _run_grant)


def _run_grant(session: Any, message: pb.DraftRequest, *rest: Any) -> Iterator[pb.DraftResponse]:
    if LINKS[message.grant.link].way == "device":
        # Imported late: torch comes with the model.
        from outrider.draft_service import device_rounds

        return device_rounds.run(session, message, *rest)
    return host_rounds.run(session, message, *rest)
