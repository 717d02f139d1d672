"""What both services do around turns that the device takes: whether it can, and looking on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from outrider.shared.doorbell import Doorbell, Watch
from outrider.shared.errors import OutriderError

if TYPE_CHECKING:
    from outrider.shared.cuda_turns import Turns, TurnSequence

LOOK_SECONDS = 5e-5
"""How often the host looks whether a turn is done. Nobody waits for the host meanwhile: the other
side's turn is several times as long."""
TurnsT = TypeVar("TurnsT", bound="Turns")


class NotOnDevice(OutriderError):
    """The device can't take these turns; the message says why, and the host can."""

    status = "FAILED_PRECONDITION"


@contextmanager
def turns_of(session: Any, doorbell: Doorbell | None, kind: type[TurnsT]) -> Iterator[TurnsT]:
    """The device's turns, with the engine to themselves. Raises ``NotOnDevice``.

    Two coordinators with a pair of engines in common could otherwise wait for each other: one's
    turn on the draft's device for a verifier that waits, in the other's turn, for that draft.
    """
    engine = session.engine
    if doorbell is None or doorbell.device is None:
        raise NotOnDevice("draft and verifier share no device memory")
    if not hasattr(engine.runner, "turns"):
        raise NotOnDevice(f"the runner {engine.info().runner!r} takes no turns by itself")
    if not engine.lock.acquire(blocking=False):
        raise NotOnDevice("another coordinator's round is running")
    try:
        if doorbell.turns is None:
            doorbell.turns = engine.runner.turns(kind, doorbell.device)
        yield doorbell.turns
    finally:
        engine.lock.release()


def start(turns: Turns, grant: int, sequences: Sequence[TurnSequence]) -> None:
    """Begins a grant's turns. Raises ``NotOnDevice``."""
    reason = turns.why_not(sequences)
    if reason is not None:
        raise NotOnDevice(reason)
    turns.start(grant, sequences)


def look_on(turns: Turns, watch: Watch, heard: Callable[[], bool]) -> bool:
    """Until the turn is done; False where ``heard`` says first that it waits in vain.

    Raises ``PeerGone`` or ``PeerLate``. In either case it is still queued.
    """
    while not turns.done():
        if watch.doorbell.rung() and heard():
            return False
        watch.check()
        time.sleep(LOOK_SECONDS)
    watch.reset()
    return True


@contextmanager
def left_in_order(turns: Turns) -> Iterator[None]:
    """Leaves no turn queued behind, however it is left: one that waits passes and does nothing."""
    try:
        yield
    finally:
        if not turns.done():
            turns.release()
            while not turns.done():
                time.sleep(LOOK_SECONDS)
