"""Grants, as a service's stream sees them: messages that come while rounds run by themselves.

A stream's handler runs the rounds of a grant on its own thread. What the coordinator sends
meanwhile is read on a second one: a change to the grant takes effect with the next round, anything
else ends the grant after the round that runs and is handled then, in order.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from outrider.protos import speculation_pb2 as pb
from outrider.shared.core.errors import OutriderError


class EndReason(IntEnum):
    """Why a grant is over; the numbers of ``outrider.v1.GrantEndReason``."""

    CREDITS = 1
    STOPPED = 2
    REVOKED = 3
    REFUSED = 4
    PEER = 5
    LATE = 6
    HOST = 7


@dataclass(frozen=True, slots=True)
class End:
    """The end of a grant."""

    reason: EndReason
    message: str = ""


class NotOnDevice(OutriderError):
    """The device can't take these turns; the message says why, and the host can."""

    status = "FAILED_PRECONDITION"


class Control:
    """The coordinator's word on one grant; ``hear`` is called on the reading thread."""

    def __init__(self, grant: pb.Grant) -> None:
        self.id = grant.id
        self._rounds = grant.rounds
        self._change: tuple[int, list[int]] | None = None
        self.interrupted = False
        """The grant is to end after the round that runs."""

    def hear(self, message: Any) -> bool:
        """Takes in a message, None being the stream's end; whether that was all it wanted."""
        if message is not None and message.HasField("change"):
            if message.change.id == self.id:
                if message.change.rounds:
                    # Ks that a round has yet to take in are kept by a change that has none.
                    ks = list(message.change.ks) or (self._change or (0, []))[1]
                    self._change = (message.change.rounds, ks)
                else:
                    self.interrupted = True
            return True
        self.interrupted = True
        return False

    @property
    def ending(self) -> bool:
        """Whether it is plain that the grant ends with the round that runs, or has new Ks then."""
        change = self._change
        if change is None:
            return self.interrupted or self._rounds <= 1
        return self.interrupted or bool(change[1])

    def step(self) -> tuple[int, list[int]]:
        """Counts one round: how many are left, and new Ks where they were changed."""
        self._rounds -= 1
        change, self._change = self._change, None
        if change is None:
            return self._rounds, []
        self._rounds, ks = change
        return self._rounds, ks


class Inbox:
    """The messages of one stream, in order; ``listen`` hears them while a grant runs."""

    def __init__(self, messages: Iterator[Any]) -> None:
        self._messages = messages
        self._ahead: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._reading = False
        self._control: Control | None = None

    def __iter__(self) -> Iterator[Any]:
        while True:
            try:
                # While the second thread waits for a message, it is the one that gets it.
                message = self._ahead.get() if self._reading else next(self._messages)
            except StopIteration:
                return
            if isinstance(message, BaseException):
                self._reading = False
                if isinstance(message, StopIteration):
                    return
                raise message
            if self._reading:
                self._reading = False
            if message.HasField("change"):
                continue  # to a grant that ended before it came
            yield message

    def listen(self, control: Control) -> None:
        """From now on ``control`` hears what comes, until ``deafen``."""
        self._control = control
        self._reading = True
        threading.Thread(target=self._read, name="grant control", daemon=True).start()

    def deafen(self) -> None:
        """The grant is over."""
        self._control = None

    def _read(self) -> None:
        while True:
            message: Any = None
            try:
                message = next(self._messages)
            except BaseException as error:
                self._hear(None)
                self._ahead.put(error)
                return
            if not self._hear(message):
                self._ahead.put(message)
                return

    def _hear(self, message: Any) -> bool:
        control = self._control
        return control is not None and control.hear(message)


def next_k(k: int, limit: int, n: int) -> int:
    """Draft tokens worth having next for a log of ``n`` tokens that is to have ``limit``.

    Of ``k`` at most: the base writes the last token itself. ``take.cu`` and ``follow.cu`` have
    the same formula.
    """
    return max(0, min(k, limit - n - 1))


def end_message(grant: pb.Grant, end: End, rounds: int) -> pb.GrantEnd:
    """The end as a message."""
    reason: Any = int(end.reason)
    return pb.GrantEnd(id=grant.id, reason=reason, message=end.message, rounds=rounds)
