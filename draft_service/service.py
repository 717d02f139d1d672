"""``outrider.v1.Draft``: protos in and out of the draft engine."""

from __future__ import annotations

from outrider.draft_service import free_running
from outrider.shared import wire
from outrider.shared.rounds import RoundsServicer


def make_servicer() -> RoundsServicer:
    """The servicer, still without its engine."""
    return RoundsServicer(wire.read_propose_items, wire.write_draft_response, free_running.run)
