"""Messages while a grant runs: all are handled once and in order, changes by the next round."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    precondition,
    rule,
    run_state_machine_as_test,
)

from outrider.protos import speculation_pb2 as pb
from outrider.shared.rounds.grants import Control, End, EndReason, Inbox, end_message, next_k
from outrider_testing.waiting import soon

WAIT = 60.0


class Source:
    """A stream's messages, as gRPC gives them: who asks for the next one waits for it."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.asked = 0
        """How many messages were asked for; whoever asks has dealt with the one before."""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.asked += 1
        message = self._queue.get()
        if isinstance(message, BaseException):
            self._queue.put(message)  # the end stays the end
            raise message
        return message

    def put(self, *messages: Any) -> None:
        for one in messages:
            self._queue.put(one)

    def end(self, error: BaseException | None = None) -> None:
        self._queue.put(error or StopIteration())


@pytest.fixture
def source() -> Iterator[Source]:
    made = Source()
    before = set(threading.enumerate())
    yield made
    made.end()  # whoever still reads is done
    soon(lambda: set(threading.enumerate()) <= before)


def plain(number: int) -> pb.VerifyRequest:
    return pb.VerifyRequest(round=number)


def granting(number: int, grant: int, rounds: int = 100) -> pb.VerifyRequest:
    return pb.VerifyRequest(round=number, grant=pb.Grant(id=grant, rounds=rounds))


def changing(grant: int, rounds: int, ks: tuple[int, ...] = ()) -> pb.VerifyRequest:
    return pb.VerifyRequest(change=pb.GrantChange(id=grant, rounds=rounds, ks=ks))


def listening(source: Source, grant: int = 7, rounds: int = 100) -> tuple[Inbox, Any, Control]:
    """A stream on which that grant has just begun to run; also its messages and the control."""
    inbox = Inbox(source)
    messages = iter(inbox)
    source.put(granting(1, grant, rounds))
    control = Control(next(messages).grant)
    inbox.listen(control)
    return inbox, messages, control


def rounds_of(messages: Iterator[Any]) -> list[int]:
    return [one.round for one in messages]


# --- control -------------------------------------------------------------------------------------


def control_of(rounds: int) -> Control:
    return Control(pb.Grant(id=7, rounds=rounds))


def test_control_counts_the_rounds_that_are_left() -> None:
    control = control_of(3)
    assert [control.step() for _ in range(4)] == [(2, []), (1, []), (0, []), (-1, [])]
    assert not control.interrupted


def test_control_change_takes_effect_with_the_next_step_and_once() -> None:
    control = control_of(10)
    control.step()
    assert control.hear(changing(7, 4, (3, 2)))
    assert control.step() == (4, [3, 2])
    assert control.step() == (3, [])
    assert not control.interrupted


def test_control_change_without_ks_leaves_them() -> None:
    control = control_of(10)
    assert control.hear(changing(7, 40))
    assert control.step() == (40, [])


def test_control_changes_between_two_steps_add_up() -> None:
    control = control_of(10)
    control.hear(changing(7, 4, (1, 1)))
    control.hear(changing(7, 5, (3, 2)))
    control.hear(changing(7, 6))  # more rounds; the Ks are to stay as asked for just before
    assert control.step() == (6, [3, 2])
    control.hear(changing(7, 9))
    assert control.step() == (9, [])


def test_control_change_of_another_grant_is_ignored() -> None:
    control = control_of(10)
    for other in (0, 6, 8):
        assert control.hear(changing(other, 0))
        assert control.hear(changing(other, 50, (1,)))
    assert not control.interrupted
    assert control.step() == (9, [])


def test_control_change_to_no_rounds_interrupts() -> None:
    control = control_of(10)
    assert control.hear(changing(7, 0))
    assert control.interrupted


@pytest.mark.parametrize(
    "message",
    [None, plain(2), granting(2, 8), granting(2, 7), pb.VerifyRequest(goodbye=True)],
    ids=["end", "round", "grant", "same grant", "goodbye"],
)
def test_control_anything_else_interrupts_and_is_not_taken(message: Any) -> None:
    control = control_of(10)
    assert not control.hear(message)
    assert control.interrupted


# --- inbox ---------------------------------------------------------------------------------------


def test_inbox_without_a_grant_passes_all_messages_on(source: Source) -> None:
    source.put(*(plain(number) for number in range(5)))
    source.end()
    assert rounds_of(iter(Inbox(source))) == [0, 1, 2, 3, 4]


def test_inbox_keeps_the_order_before_while_and_after_a_grant(source: Source) -> None:
    inbox = Inbox(source)
    messages = iter(inbox)
    source.put(plain(1), plain(2), granting(3, 7), plain(4), plain(5))
    assert [next(messages).round for _ in range(3)] == [1, 2, 3]
    control = control_of(100)
    inbox.listen(control)
    soon(lambda: control.interrupted)
    source.put(plain(6))
    inbox.deafen()
    source.put(plain(7))
    source.end()
    assert rounds_of(messages) == [4, 5, 6, 7]


def test_inbox_reads_no_further_than_what_interrupts(source: Source) -> None:
    # What follows is for whoever handles that message: another grant, and a change to it.
    inbox, messages, control = listening(source)
    source.put(granting(2, 8), changing(8, 30, (4,)), plain(3))
    soon(lambda: control.interrupted)
    inbox.deafen()
    assert control.step() == (99, [])
    message = next(messages)
    assert (message.round, message.grant.id) == (2, 8)
    second = Control(message.grant)
    inbox.listen(second)
    soon(lambda: second.interrupted)
    assert second.step() == (30, [4])
    inbox.deafen()
    source.end()
    assert rounds_of(messages) == [3]


def test_inbox_changes_reach_the_grant_that_runs(source: Source) -> None:
    inbox, messages, control = listening(source)
    source.put(changing(6, 0), changing(7, 20, (2, 3)), changing(8, 1, (9, 9)))
    soon(lambda: source.asked == 1 + 3 + 1)
    assert not control.interrupted
    assert control.step() == (20, [2, 3])
    assert control.step() == (19, [])
    source.put(changing(7, 0))
    soon(lambda: control.interrupted)
    inbox.deafen()
    source.put(plain(2))
    source.end()
    assert rounds_of(messages) == [2]


def test_inbox_change_to_a_grant_that_ended_is_skipped(source: Source) -> None:
    inbox, messages, control = listening(source)
    inbox.deafen()
    source.put(changing(7, 0), changing(7, 9, (1,)), plain(2), changing(7, 0), plain(3))
    source.end()
    assert rounds_of(messages) == [2, 3]
    assert not control.interrupted
    assert control.step() == (99, [])


def test_inbox_message_for_a_handler_that_waits_already_is_given_to_it(source: Source) -> None:
    inbox, messages, _ = listening(source)
    inbox.deafen()
    soon(lambda: source.asked == 2)  # the second thread waits for the message
    got: queue.SimpleQueue[int] = queue.SimpleQueue()

    def handle() -> None:
        for message in messages:
            got.put(message.round)

    thread = threading.Thread(target=handle)
    thread.start()
    for number in (2, 3):
        source.put(plain(number))
        assert got.get(timeout=WAIT) == number
    source.end()
    thread.join(WAIT)
    assert not thread.is_alive() and got.empty()


@pytest.mark.parametrize("deaf", [False, True], ids=["listening", "after it"])
def test_inbox_end_of_the_stream_is_passed_on(source: Source, deaf: bool) -> None:
    inbox, messages, control = listening(source)
    if deaf:
        inbox.deafen()
    source.end()
    if not deaf:
        soon(lambda: control.interrupted)
    assert list(messages) == []
    assert list(inbox) == []  # whoever asks again is told again


@pytest.mark.parametrize("deaf", [False, True], ids=["listening", "after it"])
def test_inbox_error_of_the_stream_is_passed_on_once(source: Source, deaf: bool) -> None:
    inbox, messages, control = listening(source)
    if deaf:
        inbox.deafen()
    source.put(changing(7, 50))
    source.end(ConnectionError("the coordinator is gone"))
    if not deaf:
        soon(lambda: control.interrupted)
        assert control.step() == (50, [])
    with pytest.raises(ConnectionError, match="the coordinator is gone"):
        next(messages)
    assert list(messages) == []


def test_inbox_error_after_what_interrupted_comes_after_it(source: Source) -> None:
    inbox, messages, control = listening(source)
    source.put(plain(2))
    source.end(ConnectionError("the coordinator is gone"))
    soon(lambda: control.interrupted)
    inbox.deafen()
    assert next(messages).round == 2
    with pytest.raises(ConnectionError):
        next(messages)


class Stream(RuleBasedStateMachine):
    """Sending and handling, grants that begin, run and end, in any order, against a list."""

    def __init__(self) -> None:
        super().__init__()
        self.source = Source()
        self.inbox = Inbox(self.source)
        self.messages = iter(self.inbox)
        self.waiting: deque[pb.VerifyRequest] = deque()
        """Sent, and neither handled nor heard by a grant as yet."""
        self.number = self.grant = 0
        """Of the last message and the last grant that were sent."""
        self.sent = 0
        self.control: Control | None = None
        self.left, self.interrupted = 0, False
        self.threads = set(threading.enumerate())

    def send(self, message: pb.VerifyRequest) -> None:
        self.sent += 1
        self.waiting.append(message)
        self.source.put(message)

    @rule()
    def send_plain(self) -> None:
        self.number += 1
        self.send(plain(self.number))

    @rule(rounds=st.integers(1, 9))
    def send_grant(self, rounds: int) -> None:
        self.number, self.grant = self.number + 1, self.grant + 1
        self.send(granting(self.number, self.grant, rounds))

    @rule(back=st.integers(0, 2), rounds=st.integers(0, 9), ks=st.lists(st.integers(1, 9)))
    def send_change(self, back: int, rounds: int, ks: list[int]) -> None:
        self.send(changing(self.grant - min(back, self.grant), rounds, tuple(ks)))

    @precondition(lambda self: not self.control and any(map(is_handled, self.waiting)))
    @rule()
    def handle(self) -> None:
        while not is_handled(self.waiting[0]):
            self.waiting.popleft()  # to a grant that is over
        message = next(self.messages)
        assert message == self.waiting.popleft()
        if message.HasField("grant"):
            self.control = Control(message.grant)
            self.left, self.interrupted = message.grant.rounds, False
            self.inbox.listen(self.control)

    @precondition(lambda self: self.control)
    @rule()
    def step(self) -> None:
        """A round of the grant, once all was heard that it is to hear."""
        assert self.control is not None
        self.left, ks = self.left - 1, list[int]()
        while self.waiting and not is_handled(self.waiting[0]):
            change = self.waiting.popleft().change
            if change.id == self.control.id and change.rounds:
                self.left, ks = change.rounds, list(change.ks) or ks
            self.interrupted |= change.id == self.control.id and not change.rounds
        # Whoever listens asks for more, or has stopped at the first message to be handled.
        soon(lambda: self.source.asked == self.sent - len(self.waiting) + 1)
        if self.waiting:
            self.interrupted = True
            soon(lambda: self.control is not None and self.control.interrupted)
        assert self.control.step() == (self.left, ks)
        assert self.control.interrupted == self.interrupted

    @precondition(lambda self: self.control)
    @rule()
    def end_grant(self) -> None:
        """At any moment: what was sent may be heard by the grant, or not any more."""
        self.inbox.deafen()
        self.control = None

    def teardown(self) -> None:
        self.inbox.deafen()
        self.source.end()
        assert list(self.messages) == list(filter(is_handled, self.waiting))
        soon(lambda: set(threading.enumerate()) <= self.threads)


def is_handled(message: pb.VerifyRequest) -> bool:
    """By the stream's handler, that is, not a change to a grant."""
    return not message.HasField("change")


def test_inbox_in_any_order_of_events_passes_on_all_that_is_to_be_handled() -> None:
    run_state_machine_as_test(
        Stream, settings=settings(max_examples=100, stateful_step_count=30, deadline=None)
    )


# --- ends ----------------------------------------------------------------------------------------


def test_end_reasons_have_the_numbers_of_the_protocol() -> None:
    for reason in EndReason:
        assert pb.GrantEndReason.Value(f"GRANT_END_REASON_{reason.name}") == reason
    assert len(pb.GrantEndReason.keys()) == len(EndReason) + 1  # and the one that is not known


def test_end_message_tells_the_end() -> None:
    message = end_message(pb.Grant(id=7), End(EndReason.LATE, "it slept"), 12)
    wanted = pb.GrantEnd(id=7, reason=pb.GRANT_END_REASON_LATE, message="it slept", rounds=12)
    assert message == wanted


@pytest.mark.parametrize(
    ("k", "limit", "n", "wanted"),
    [(4, 100, 50, 4), (4, 55, 50, 4), (4, 54, 50, 3), (4, 51, 50, 0), (4, 50, 50, 0),
     (4, 50, 60, 0), (0, 100, 50, 0)],
)  # fmt: skip
def test_next_k_leaves_the_base_a_token_of_its_own(k: int, limit: int, n: int, wanted: int) -> None:
    assert next_k(k, limit, n) == wanted
