"""What both services do around turns that the device takes: whether it can, and looking on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from outrider.protos import speculation_pb2 as pb
from outrider.shared.core.types import ProposeItem, VerifyItem
from outrider.shared.link.doorbell import Doorbell, Watch
from outrider.shared.model.cuda.turns.turns import Turns, TurnSequence
from outrider.shared.rounds.grants import NotOnDevice
from outrider.shared.rounds.session import Engine, Session

LOOK_SECONDS = 5e-5
"""How often the host looks whether a turn is done. Nobody waits for the host meanwhile: the other
side's turn is several times as long."""
BUSY_SECONDS = 0.2
"""How long it waits for what the engine does between rounds. Another coordinator's turns last
longer."""
PREPARE_SECONDS = 10.0
"""How long a grant waits for turns that are being rehearsed."""
TurnsT = TypeVar("TurnsT", bound=Turns)
ItemT = TypeVar("ItemT", ProposeItem, VerifyItem)


@contextmanager
def taking(session: Session[Any, Any], doorbell: Doorbell, kind: type[TurnsT]) -> Iterator[TurnsT]:
    """The device's turns, with the engine to themselves; none is left queued behind.

    Raises ``NotOnDevice``.

    Two coordinators with a pair of engines in common could otherwise wait for each other: one's
    turn on the draft's device for a verifier that waits, in the other's turn, for that draft.
    """
    engine = session.engine
    if doorbell.device is None:
        raise NotOnDevice("draft and verifier share no device memory")
    runner: Any = engine.runner
    if not hasattr(runner, "turns"):
        raise NotOnDevice(f"the runner {engine.info().facts.runner!r} takes no turns by itself")
    doorbell.prepared.wait(PREPARE_SECONDS)
    if not engine.lock.acquire(timeout=BUSY_SECONDS):
        raise NotOnDevice("another coordinator's round is running")
    try:
        if doorbell.turns is None:
            doorbell.turns = runner.turns(kind, doorbell.device)
        with _left_in_order(doorbell.turns):
            yield doorbell.turns
    finally:
        engine.lock.release()


def prepare(engine: Engine[Any, Any], doorbell: Doorbell, kind: type[Turns]) -> None:
    """Rehearses the turns over a mailbox with device memory before anybody asks for them."""
    runner: Any = engine.runner
    if not hasattr(runner, "turns"):
        return
    doorbell.turns = runner.turns(kind, doorbell.device)
    rehearse(engine, doorbell.turns)


def rehearse(engine: Engine[Any, Any], turns: Turns) -> None:
    """Rehearses the turns that are likely to come; between them the engine is everybody's."""
    for slots, steps in turns.sizes_ahead():
        with engine.lock, torch.inference_mode():
            engine.used_at = time.monotonic()
            turns.rehearse(slots, steps)
        engine.give_way()


def in_order(
    items: Sequence[ItemT], grant: pb.Grant
) -> tuple[list[ItemT], list[pb.GrantedSequence]]:
    """The grant's sequences in an order that both sides have: a place in it is a slot."""
    pairs = sorted(zip(items, grant.sequences, strict=True), key=lambda pair: pair[0].sequence_id)
    return [item for item, _ in pairs], [one for _, one in pairs]


def start(
    turns: Turns,
    session: Session[Any, Any],
    grant: int,
    lanes: Sequence[Any],
    granted: Sequence[Any],
) -> None:
    """Begins a grant's turns and queues the first one. Raises ``NotOnDevice``.

    ``lanes``: where the sequences stand, all taken in but what a turn forwards.
    """
    sequences = [_sequence(session, lane, one) for lane, one in zip(lanes, granted, strict=True)]
    reason = turns.why_not(sequences)
    if reason is not None:
        raise NotOnDevice(reason)
    turns.start(grant, sequences)
    turns.queue()


def take_in(session: Session[Any, Any], items: Sequence[Any]) -> None:
    """Has the host take in what turns do not forward. Raises ``NotOnDevice``."""
    refused = session.round(items).refusals if items else []
    if refused:
        raise NotOnDevice(refused[0].message)


def _sequence(session: Session[Any, Any], lane: Any, granted: pb.GrantedSequence) -> TurnSequence:
    held = session.held(lane.sequence_id)
    if not granted.k or held.epoch != lane.epoch or held.extent.valid_len < lane.base_len:
        raise NotOnDevice(f"sequence {lane.sequence_id} is not ready for turns")
    last = [*held.log[max(lane.base_len - 1, 0) : lane.base_len], *lane.append]
    before = last[-2] if len(last) > 1 else 0
    return TurnSequence(
        held.extent, held.decoding, before, last[-1], lane.base_len + len(lane.append),
        granted.k, granted.limit,
    )  # fmt: skip


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
def _left_in_order(turns: Turns) -> Iterator[None]:
    """Leaves no turn queued behind, however it is left: one that waits passes and does nothing."""
    try:
        yield
    finally:
        if not turns.done():
            turns.release()
            while not turns.done():
                time.sleep(LOOK_SECONDS)
