"""What the coordinator makes of a draft that is late or lost, in whatever order it learns of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from outrider.coordinator.requests.sequence import ServiceState
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


class Answering:
    """A connection whose answers come when the test says so."""

    up, waiting = True, 0

    def __init__(self, *, at_once: bool = False) -> None:
        self._at_once = at_once
        self.late: list[Callable[[pb.DraftResponse], None]] = []

    def next_number(self) -> int:
        return len(self.late) + 1

    async def send(self, request: pb.DraftRequest, late: Any) -> asyncio.Future[Any]:
        self.late.append(late)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self._at_once:
            future.set_result(pb.DraftResponse())
        return future


def behind(rows: int) -> Any:
    """A sequence under `rejection` with a fixed K, of which the draft lacks so many rows."""
    state = ServiceState(open=True)
    return SimpleNamespace(
        sequence_id=1,
        log=list(range(rows)),
        draft=state,
        parent=None,
        replays_rounds=True,
        may_open=lambda state: True,
        base_len=lambda state: min(state.length, rows - 1),
        output=SimpleNamespace(finish=None),
    )


@pytest.mark.parametrize("ends", ["answered", "lost", "late"])
async def test_drafting_that_is_to_be_replayed_begins_when_the_chunk_before_it_is_done(
    ends: str,
) -> None:
    """The patience for a proposal is not used up by a chunk that was sent in the background."""
    connection: Any = Answering()
    drafting = Drafting(connection, chunk=40, patience=0.01 if ends == "late" else 600.0)
    sequence = behind(40)
    await drafting.catch_up([sequence])
    near = asyncio.create_task(drafting.bring_near([sequence]))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not near.done()
    if ends == "lost":
        drafting.lost([])
    elif ends == "answered":
        connection.late[0](pb.DraftResponse())
    await asyncio.wait_for(near, 60)
    assert drafting.available == (ends != "late")
    if ends == "late":
        connection.late[0](pb.DraftResponse())
        assert drafting.available


async def test_drafting_takes_an_answer_that_came_before_its_message_was_out() -> None:
    connection: Any = Answering(at_once=True)
    drafting = Drafting(connection, chunk=40, patience=600.0)
    sequence = behind(40)
    await drafting.catch_up([sequence])
    await asyncio.wait_for(drafting.bring_near([sequence]), 60)
    assert drafting.available
