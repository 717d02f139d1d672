"""``outrider.v1.Verify``: protos in and out of the verify engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from outrider.shared import wire
from outrider.shared.ahead import ahead
from outrider.shared.rounds import RoundsServicer
from outrider.verify_service import free_running

REPORTS_AHEAD = 16
"""Rounds that a grant may be ahead of what the coordinator has been told."""


def make_servicer() -> RoundsServicer:
    """The servicer, still without its engine."""
    return RoundsServicer(wire.read_verify_items, wire.write_verify_response, _run_grant)


def _run_grant(*grant: Any) -> Iterator[Any]:
    return ahead(free_running.run(*grant), REPORTS_AHEAD)
