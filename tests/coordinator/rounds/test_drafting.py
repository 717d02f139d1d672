"""What the coordinator makes of a draft that is late or lost, in whatever order it learns of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from outrider.coordinator.rounds.draft_messages import DraftGrant
from outrider.coordinator.rounds.drafting import Drafting
from outrider.protos import speculation_pb2 as pb


@pytest.mark.parametrize(
    "happens",
    [
        lambda drafting: drafting.lost([]),
        lambda drafting: drafting._came_late(pb.DraftResponse(), {}),
    ],
    ids=["lost", "answered"],
)
async def test_drafting_given_up_draft_is_of_use_again_whatever_happens_first(
    happens: Callable[[Drafting], None],
) -> None:
    connection: Any = SimpleNamespace(up=True)
    drafting = Drafting(connection, chunk=8, patience=0.01)
    answer: asyncio.Future[pb.DraftResponse] = asyncio.get_running_loop().create_future()
    given_up = []

    def at_once(future: Any) -> None:
        given_up.append(not drafting.available)
        happens(drafting)

    answer.add_done_callback(at_once)  # runs before whoever waits for the answer runs on
    assert await drafting.granted(DraftGrant(answer, {})) == 0
    assert given_up == [True]
    assert drafting.available
