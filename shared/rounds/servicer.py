"""The Rounds stream and Info, the same for draft and verifier.

A stream's handler runs in a thread of its own and calls the engine directly: the engine
serialises its callers, and no event loop stands between a message and its forward.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import grpc

from outrider.protos import speculation_pb2 as pb
from outrider.shared.core import wire
from outrider.shared.core.errors import RefusalCode, SequenceRefused, ServiceUnavailable
from outrider.shared.core.model_facts import write_description
from outrider.shared.core.resident_memory import resident_bytes
from outrider.shared.core.traceparent import stepped
from outrider.shared.core.types import CostPoint, Refusal, RoundResult
from outrider.shared.link.doorbell import Doorbell
from outrider.shared.link.registry import Mailboxes
from outrider.shared.rounds import grant_loop
from outrider.shared.rounds.grants import Control, Inbox

if TYPE_CHECKING:
    from outrider.shared.link.device.handshake import DeviceSide
    from outrider.shared.rounds.session import Engine, Session

log = logging.getLogger(__name__)


Seen = Callable[[Any, Sequence[Any], RoundResult[Any], float, float], None]
"""Message, items, result, and when it arrived and was answered by ``time.perf_counter``."""

RunGrant = Callable[
    ["Session[Any, Any]", Any, Doorbell | None, Control, grant_loop.Seen], Iterator[Any]
]
"""See ``grant_loop.run``."""


@dataclass(frozen=True, slots=True)
class GrantedRoundMessage:
    """What a round of a grant has in place of a message."""

    round: int
    traceparent: str


class RoundsServicer:
    """Implements ``Rounds`` and ``Info`` of both services over any engine.

    It answers UNAVAILABLE until ``attach`` gives it the engine, so that a server can listen,
    and say that it is not ready, while the model still loads.
    """

    def __init__(
        self,
        read_items: Callable[[Any], list[Any]],
        write_response: Callable[[int, RoundResult[Any], float], Any],
        run_grant: RunGrant,
        *,
        prepare_stream: Callable[[Session[Any, Any]], None] = lambda session: None,
        prepare_mailbox: Callable[[Engine[Any, Any], Doorbell], None] = lambda engine, doorbell: (
            None
        ),
    ) -> None:
        """The two functions of ``wire`` for the service's messages, and its rounds by grant.

        ``prepare_stream`` and ``prepare_mailbox``: what is done with either before it is used, with
        a mailbox where it has device memory.
        """
        self._read_items = read_items
        self._write_response = write_response
        self._run_grant = run_grant
        self._prepare_stream = prepare_stream
        self._mailboxes = Mailboxes()
        self._mailboxes.prepare = lambda doorbell: prepare_mailbox(self._ready(), doorbell)
        self._engine: Engine[Any, Any] | None = None
        self._seen: Seen | None = None
        self.memory_bandwidth = 0.0
        """Bytes per second, for ``Info``; 0 where it was not measured."""
        self.costs: Sequence[CostPoint] = ()
        """What rounds take, for ``Info``."""
        self._draining = False
        self._lock = threading.Lock()
        self._streams = 0

    def attach(
        self, engine: Engine[Any, Any], *, link_spin: float = 0.0, device: DeviceSide | None = None
    ) -> None:
        """From now on rounds are served.

        ``link_spin``: seconds, see ``Doorbell``; ``device``: where turns can be taken without
        the host.
        """
        self._mailboxes.spin, self._mailboxes.device = link_spin, device
        self._engine = engine

    def watch(self, seen: Seen) -> None:
        """From now on ``seen`` is told of each round, after its answer has gone out."""
        self._seen = seen

    def drain(self) -> None:
        """From now on no sequence is admitted; those that live go on."""
        self._draining = True

    def idle(self) -> bool:
        """Whether no sequence lives."""
        return self._engine is None or self._engine.info().sequences == 0

    def Rounds(self, request_iterator: Iterator[Any], context: Any) -> Iterator[Any]:
        """One coordinator connection: what it opened is freed when it ends, however it ends."""
        session: Session[Any, Any] = self._ready().connect()
        with self._lock:
            self._streams += 1
        peer = context.peer()
        farewell = False
        mailboxes: set[int] = set()
        try:
            self._prepare_stream(session)
            inbox = Inbox(request_iterator)
            for message in inbox:
                arrived = time.perf_counter()
                refusals = self._admit(session, message)
                if message.HasField("grant"):
                    mailboxes.add(message.grant.mailbox)
                    yield from self._granted(session, message, inbox)
                    continue
                items = self._read_items(message)
                result = session.round(items)
                if refusals:
                    result.refusals[:0] = refusals
                answered = time.perf_counter()
                # Before the answer: whoever has it may hang up, and this never goes on.
                farewell = message.goodbye
                yield self._write_response(message.round, result, answered - arrived)
                if self._seen is not None:
                    self._seen(message, items, result, arrived, answered)
                if farewell:
                    return
        finally:
            session.release()
            self._mailboxes.close(mailboxes)
            if not farewell:
                # Cancelled, connection lost, or half-closed: all the same to us.
                log.warning("stream from %s ended without goodbye; its extents are freed", peer)
            with self._lock:
                self._streams -= 1

    def _granted(self, session: Session[Any, Any], message: Any, inbox: Inbox) -> Iterator[Any]:
        """Rounds that run by themselves until the grant ends."""
        control = Control(message.grant)

        def seen(step: int, items: Any, result: Any, arrived: float, answered: float) -> None:
            if self._seen is not None:
                traceparent = message.traceparent and stepped(message.traceparent, step)
                told = GrantedRoundMessage(message.round, traceparent)
                self._seen(told, items, result, arrived, answered)

        inbox.listen(control)
        try:
            with self._mailboxes.used(message.grant.mailbox) as doorbell:
                yield from self._run_grant(session, message, doorbell, control, seen)
        finally:
            inbox.deafen()

    def OfferMailbox(self, request: Any, context: Any) -> Any:
        """Verify only: makes a mailbox that waits for its draft."""
        return self._mailboxes.offer(request, context.peer())

    def MapMailbox(self, request: Any, context: Any) -> Any:
        """Draft only: fetches the mailbox that a verifier offers."""
        return self._mailboxes.map(request, context.peer())

    def Info(self, request: Any, context: Any) -> Any:
        """Describes the model and its limits."""
        # First: a stream that is no longer counted has given back what it held.
        streams = self._streams
        device = self._mailboxes.device
        info = self._ready().info()
        return pb.ServiceInfoResponse(
            version=metadata.version("outrider"),
            protocol=wire.PROTOCOL,
            model=write_description(info),
            arena_tokens_largest_free=info.arena_tokens_largest_free,
            sequences=info.sequences,
            max_k=info.max_k,
            streams=streams,
            resident_bytes=resident_bytes(),
            memory_bandwidth=self.memory_bandwidth,
            grants=True,
            device_uuid=device.uuid if device is not None else "",
            costs=[pb.CostPoint(**asdict(point)) for point in self.costs],
        )

    def _ready(self) -> Engine[Any, Any]:
        if self._engine is None:
            raise ServiceUnavailable("the model is still loading")
        return self._engine

    def _admit(self, session: Session[Any, Any], message: Any) -> list[Refusal]:
        """Frees, caches and reserves what the message asks for; returns what was refused."""
        for sequence_id in message.close:
            session.close(sequence_id)
        for one in message.cache:
            session.cache(one.sequence_id, one.length)
        refusals = []
        for one in message.open:
            try:
                if self._draining:
                    raise SequenceRefused(RefusalCode.NO_CAPACITY, "the service is shutting down")
                session.open(wire.read_open(one))
            except SequenceRefused as error:
                refusals.append(
                    Refusal(one.sequence_id, one.epoch, error.code, str(error), error.held_len)
                )
        return refusals


def add_to_server(server: grpc.Server, servicer: RoundsServicer, service: str) -> None:
    """Registers ``servicer`` as ``outrider.v1.Draft`` or ``outrider.v1.Verify``."""
    from outrider.protos import speculation_pb2_grpc as stubs

    getattr(stubs, f"add_{service}Servicer_to_server")(servicer, server)
