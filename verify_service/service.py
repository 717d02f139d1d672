"""``outrider.v1.Verify``: protos in and out of the verify engine."""

from __future__ import annotations

from outrider.shared import wire
from outrider.shared.rounds import RoundsServicer
from outrider.verify_service import free_running


def make_servicer() -> RoundsServicer:
    """The servicer, still without its engine."""
    return RoundsServicer(wire.read_verify_items, wire.write_verify_response, free_running.run)
