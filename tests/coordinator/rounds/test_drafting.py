"""What the coordinator makes of a draft that is late or lost, in whatever order it learns of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from outrider.coordinator.requests.prefix_cache import PrefixCache
from outrider.coordinator.requests.service_state import ServiceState
from outrider.coordinator.rounds.draft_messages import DraftGrant
from outrider.coordinator.rounds.drafting import LAG, Drafting
from outrider.coordinator.rounds.prompt_budget import ALONE, START_ROWS, PromptBudget
from outrider.protos import speculation_pb2 as pb


def drafting_over(connection: Any, patience: float = 600.0, most: int = 8192) -> Drafting:
    return Drafting(
        connection, cache=PrefixCache(), budget=PromptBudget(0.1, most), patience=patience
    )


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
    drafting = drafting_over(connection, patience=0.01)
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

    up = True

    def __init__(self, *, at_once: bool = False) -> None:
        self._at_once = at_once
        self.late: list[Callable[[pb.DraftResponse], None]] = []
        self.sent: list[pb.DraftRequest] = []
        self.waiting = 0

    def next_number(self) -> int:
        return len(self.late) + 1

    async def send(self, request: pb.DraftRequest, late: Any) -> asyncio.Future[Any]:
        self.late.append(late)
        self.sent.append(request)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self._at_once:
            future.set_result(pb.DraftResponse())
        else:
            self.waiting += 1
        return future

    def answer(self, rows: int = 0, seconds: float = 0.0) -> None:
        """Answers what was sent last."""
        self.waiting -= 1
        timing = pb.Timing(rows=rows, model_seconds=seconds)
        self.late[-1](pb.DraftResponse(timing=timing))

    def rows(self) -> list[int]:
        """Of the items sent last."""
        return [len(item.append) for item in self.sent[-1].items]


class Behind(SimpleNamespace):
    """Equal to itself alone, as a sequence is."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


def behind(rows: int, sequence_id: int = 1, *, replays: bool = True) -> Any:
    """A sequence of which the draft lacks so many rows; under `rejection` with a fixed K or not."""
    state = ServiceState(open=True)
    return Behind(
        sequence_id=sequence_id,
        log=list(range(rows)),
        draft=state,
        parent=None,
        started=True,
        max_k=4,
        replays_rounds=replays,
        may_open=lambda state: True,
        base_len=lambda state: min(state.length, rows - 1),
        output=SimpleNamespace(finish=None),
    )


@pytest.mark.parametrize("ends", ["answered", "lost", "late"])
async def test_drafting_that_is_to_be_replayed_waits_until_the_draft_is_near(ends: str) -> None:
    """As long as the draft is there and in time: then its rounds are the same each time."""
    connection: Any = Answering()
    drafting = drafting_over(connection, patience=0.01 if ends == "late" else 600.0, most=30)
    sequence = behind(50)
    assert drafting.awaited([sequence]) == [sequence]
    assert await drafting.catch_up([sequence])
    freed = asyncio.Event()
    drafting.when_free(freed.set)
    assert drafting.busy and drafting.available
    assert drafting.awaited([sequence]) == [sequence]
    if ends == "lost":
        connection.up = False
        drafting.lost([])
    elif ends == "answered":
        connection.answer()
    await asyncio.wait_for(freed.wait(), 60)
    assert not drafting.busy
    assert drafting.available == (ends == "answered")
    assert drafting.awaited([sequence]) == []
    if ends == "late":
        connection.answer()
        assert drafting.available


def test_drafting_takes_along_what_fits_into_the_set_time() -> None:
    """Of all sequences of a round together; those that wait for a proposal come first."""
    drafting = drafting_over(Answering(), most=100)
    short = [behind(LAG, number, replays=False) for number in range(50)]
    some = [behind(60, 100, replays=False), behind(30, 101, replays=False)]
    assert drafting.near([*short, *some]) == {*short, *some}
    held = behind(60, 102)
    assert drafting.near([*some, held]) == {some[1], held}
    long = behind(101, 103)
    assert drafting.near([long, *some]) == {*some}
    assert drafting.awaited([long, held, *some]) == [long]


async def test_drafting_takes_an_answer_that_came_before_its_message_was_out() -> None:
    connection: Any = Answering(at_once=True)
    drafting = drafting_over(connection)
    await drafting.catch_up([behind(40)])
    assert drafting.available and not drafting.busy


async def test_drafting_catches_up_by_what_it_takes() -> None:
    """So many rows as take the set time where others want proposals, and more where none do."""
    connection: Any = Answering()
    drafting = drafting_over(connection)
    sequence = behind(100_000)
    wanted = [START_ROWS, 1000, 1000, 1000 * ALONE]
    for number, rows in enumerate(wanted):
        assert await drafting.catch_up([sequence], delays=number < 3)
        assert connection.rows() == [rows]
        assert not await drafting.catch_up([sequence])  # one at a time
        connection.answer(rows, rows * 1e-4)
    assert [item.base_len for sent in connection.sent for item in sent.items] == [
        sum(wanted[:number]) for number in range(len(wanted))
    ]


async def test_drafting_short_prompts_are_caught_up_beside_a_long_one() -> None:
    connection: Any = Answering()
    drafting = drafting_over(connection, most=400)
    await drafting.catch_up([behind(50_000), behind(90, 2), behind(60, 3)])
    assert connection.rows() == [250, 90, 60]
