"""The loop of a grant: who is told what, and what is closed, however it ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from outrider.protos import speculation_pb2 as pb
from outrider.shared.core.errors import ProtocolError, RefusalCode, SequenceRefused
from outrider.shared.core.links import LINKS, MESSAGES
from outrider.shared.core.types import RoundResult
from outrider.shared.link.doorbell import PeerGone, PeerLate
from outrider.shared.rounds import grant_loop
from outrider.shared.rounds.grant_loop import Turn
from outrider.shared.rounds.grants import Control, End, EndReason, NotOnDevice

SHARED = next(link for link in LINKS.values() if link.carrier)
STOPPED = End(EndReason.STOPPED, "it is over")


class Bell:
    """A doorbell that is only ever closed."""

    closed = False

    def close(self) -> None:
        self.closed = True


class Script:
    """A side of a grant and who takes its turns, as scripted; ``said`` is all that happened.

    ``turns``: for each, the end that it brings or None, or in place of a turn an end or an error.
    """

    def __init__(self, turns: Sequence[Any], *, reports: bool = True) -> None:
        self.turns, self.reports = list(turns), reports
        self.said: list[Any] = []
        self.bell: Any = Bell()

    @property
    def ways(self) -> dict[str, Any]:
        return {SHARED.way: self.made}

    def made(self, session: Any, message: Any, doorbell: Any, control: Any) -> Any:
        assert (doorbell, message.round) == (self.bell, 5)
        return self

    @contextmanager
    def taking(self) -> Iterator[None]:
        self.said.append("enter")
        try:
            yield
        finally:
            self.said.append("exit")
            self.closed_before_exit = self.bell.closed

    def next(self, step: int) -> Any:
        self.now = self.turns.pop(0)
        if isinstance(self.now, Exception):
            raise self.now
        if isinstance(self.now, tuple):
            return self.now[0]
        return Turn(step, [step], RoundResult(), 10**9 * step, 10**9 * (step + 1))

    def end_of(self, turn: Turn) -> End | None:
        return self.now if isinstance(self.now, End) else None

    def hand_over(self, turn: Turn, end: End | None) -> None:
        self.said.append(("hand over", turn.step, end))

    def leave(self, doorbell: Any, grant: int, step: int) -> None:
        assert (doorbell, grant) == (self.bell, 3)
        self.said.append(("leave", step))

    def report(self, message: Any, turn: Turn) -> Any:
        if not self.reports:
            return None
        response = pb.VerifyResponse(round=message.round)
        response.granted.step = turn.step
        return response

    def last(self, message: Any, turn: Turn | None) -> Any:
        self.said.append(("last", None if turn is None else turn.step))
        return pb.VerifyResponse(round=message.round)

    def seen(self, step: int, items: Any, result: Any, began: float, done: float) -> None:
        assert (items, began, done) == ([step], step, step + 1)
        self.said.append(("seen", step))

    def run(self, link: str = SHARED.name, bell: bool = True) -> Any:
        grant = pb.Grant(id=3, mailbox=9, rounds=8, link=link)
        message = pb.VerifyRequest(round=5, grant=grant)
        side: Any = self
        session: Any = None
        doorbell = self.bell if bell else None
        return grant_loop.run(side, session, message, doorbell, Control(grant), self.seen)


def told(answers: list[Any]) -> list[tuple[int | None, int, int]]:
    """Of each answer the step that it reports, and reason and rounds of the end (0: none)."""
    assert all(one.round == 5 for one in answers)
    return [
        (
            one.granted.step if one.HasField("granted") else None,
            one.grant_end.reason,
            one.grant_end.rounds,
        )
        for one in answers
    ]


def test_loop_reports_each_turn_and_the_end_with_the_last() -> None:
    script = Script([None, None, STOPPED])
    answers = list(script.run())
    assert told(answers) == [(0, 0, 0), (1, 0, 0), (2, pb.GRANT_END_REASON_STOPPED, 3)]
    assert (answers[-1].grant_end.id, answers[-1].grant_end.message) == (3, "it is over")
    assert script.said == [
        "enter",
        ("hand over", 0, None), ("seen", 0),
        ("hand over", 1, None), ("seen", 1),
        ("hand over", 2, STOPPED), ("seen", 2),
        "exit",
    ]  # fmt: skip
    assert not script.bell.closed


def test_loop_of_a_side_that_reports_nothing_answers_once() -> None:
    script = Script([None, STOPPED], reports=False)
    assert told(list(script.run())) == [(None, pb.GRANT_END_REASON_STOPPED, 2)]
    # Whoever has the answer may hang up, so all is seen before.
    assert script.said[-3:] == [("seen", 1), "exit", ("last", 1)]
    assert not script.bell.closed


def test_loop_ends_where_there_is_no_turn_to_take() -> None:
    script = Script([None, (STOPPED,)])
    assert told(list(script.run())) == [(0, 0, 0), (None, pb.GRANT_END_REASON_STOPPED, 1)]
    assert script.said[-2:] == ["exit", ("last", 0)] and not script.bell.closed


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NotOnDevice("no"), pb.GRANT_END_REASON_HOST),
        (PeerLate("late"), pb.GRANT_END_REASON_LATE),
        (PeerGone("gone"), pb.GRANT_END_REASON_PEER),
        (ProtocolError("what?"), pb.GRANT_END_REASON_PEER),
        (SequenceRefused(RefusalCode.UNKNOWN, "who?"), pb.GRANT_END_REASON_PEER),
    ],
)
def test_loop_leaves_the_other_side_a_word_or_closes(
    error: Exception, reason: Any, before: int
) -> None:
    script = Script([*[None] * before, error])
    answers = list(script.run())
    assert told(answers)[before:] == [(None, reason, before)]
    assert answers[-1].grant_end.message == str(error)
    closed = reason == pb.GRANT_END_REASON_PEER
    assert script.bell.closed == closed
    assert (("leave", before) in script.said) == (not closed)
    assert "exit" in script.said


def test_loop_that_is_left_by_the_coordinator_closes() -> None:
    script = Script([None, None, None])
    running = script.run()
    next(running)
    running.close()
    # A device's turn that is let go of must not look like the last one.
    assert script.closed_before_exit and script.said[-1] == "exit"
    over = Script([STOPPED])
    running = over.run()
    next(running)
    running.close()
    assert not over.bell.closed  # the other side has its last word


def test_loop_closes_for_an_error_that_nobody_foresaw() -> None:
    script = Script([None, ZeroDivisionError()])
    with pytest.raises(ZeroDivisionError):
        list(script.run())
    assert script.closed_before_exit


@pytest.mark.parametrize(
    ("link", "bell", "says"),
    [
        ("pigeons", True, "a grant over the link 'pigeons'"),
        (MESSAGES, True, f"a grant over the link '{MESSAGES}'"),  # the script has no such way
        (SHARED.name, False, "mailbox 9 is not mapped here"),
    ],
)
def test_loop_takes_no_turns_over_what_it_does_not_have(link: str, bell: bool, says: str) -> None:
    script = Script([])
    (answer,) = script.run(link, bell)
    assert told([answer]) == [(None, pb.GRANT_END_REASON_PEER, 0)]
    assert answer.grant_end.message == says
    assert script.said == [("last", None)]
