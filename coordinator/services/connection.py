"""Connections to the model services: a persistent stream of rounds each, kept up in the background.

A connection is *up* while its stream is open and the service passed the checks. Whatever ends
the stream (error, clean end, no answer in time), it goes down at once: every answer that was
awaited fails with ``ServiceUnavailable``, what the service held counts as gone, and connecting
is tried again until it works. Only ``close`` says goodbye; a service treats any other end as an
abort and frees what the stream held.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio

from outrider.coordinator.services.endpoint import Endpoint
from outrider.protos import speculation_pb2 as pb
from outrider.protos import speculation_pb2_grpc as pb_grpc
from outrider.shared.core.errors import (
    ConfigError,
    OutriderError,
    ProtocolError,
    ServiceUnavailable,
)
from outrider.shared.core.wire import PROTOCOL

log = logging.getLogger(__name__)

RequestT = TypeVar("RequestT", pb.DraftRequest, pb.VerifyRequest)
ResponseT = TypeVar("ResponseT", pb.DraftResponse, pb.VerifyResponse)

FIRST_BACKOFF, LAST_BACKOFF = 0.05, 2.0
INFO_TIMEOUT = 10.0
POLL_SECONDS = 0.02


@dataclass(slots=True)
class _Waiting(Generic[ResponseT]):
    """Somebody who waits for an answer."""

    sent: float
    future: asyncio.Future[ResponseT]
    late: Callable[[ResponseT], None] | None
    each: Callable[[ResponseT | None], None] | None


class Connection(Generic[RequestT, ResponseT]):
    """The stream of rounds to one service."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        check: Callable[[pb.ServiceInfoResponse], None] = lambda info: None,
        changed: Callable[[bool, str], None] = lambda up, reason: None,
    ) -> None:
        """``check`` raises ``ConfigError`` for a service that can't be used.

        ``changed(up, reason)`` is called when the connection came up or went down.
        """
        self.endpoint = endpoint
        self.up = False
        self.info: pb.ServiceInfoResponse | None = None
        """Of the service as it was when last reached."""
        self.failure: OutriderError | None = None
        """Why the connection is down, when it is."""
        self._check = check
        self._changed = changed
        self._call: Any = None
        self._pending: dict[int, _Waiting[ResponseT]] = {}
        self._number = 0
        self.at_rest = asyncio.Event()
        """Set while no message is on its way out. Whoever is cancelled before takes the stream
        along: gRPC ends a call of which a write is cancelled, and the service hears no goodbye."""
        self.at_rest.set()
        self._closing = False

    @property
    def role(self) -> str:
        """Which service: "draft" or "verify"."""
        return self.endpoint.role

    @property
    def waiting(self) -> int:
        """Requests that have not been answered yet."""
        return len(self._pending)

    def next_number(self) -> int:
        """The number of the next round on this stream."""
        self._number += 1
        return self._number

    async def send(
        self,
        request: RequestT,
        late: Callable[[ResponseT], None] | None = None,
        each: Callable[[ResponseT | None], None] | None = None,
    ) -> asyncio.Future[ResponseT]:
        """Sends one round; the future has its answer, or raises ``ServiceUnavailable``.

        Whoever will not wait for ever may settle the future himself; the answer then goes to
        ``late``. ``each`` is told of every answer to a grant, the last of which settles the
        future, and of the connection's loss by None. Returns when the message is on its way.
        Not for concurrent use.
        """
        call = self._call
        if not self.up or call is None:
            raise ServiceUnavailable(f"the {self.role} service is away")
        future: asyncio.Future[ResponseT] = asyncio.get_running_loop().create_future()
        self._pending[request.round] = _Waiting(time.monotonic(), future, late, each)
        await self._write(call, request)
        return future

    async def tell(self, request: RequestT) -> None:
        """Sends what is not answered: a change to a grant. Being away is no error."""
        if self._call is not None:
            await self._write(self._call, request)

    def touch(self) -> None:
        """What is waited for is alive: its time begins anew."""
        now = time.monotonic()
        for one in self._pending.values():
            one.sent = now

    async def ask(self, method: str, request: Any) -> Any:
        """One unary call of the service; raises ``ServiceUnavailable`` with its reason."""
        try:
            async with self.endpoint.channel() as channel:
                call = getattr(self._stub(channel), method)
                return await call(request, timeout=INFO_TIMEOUT, metadata=self.endpoint.metadata)
        except grpc.aio.AioRpcError as error:
            raise ServiceUnavailable(error.details() or error.code().name) from None

    async def describe(self) -> pb.ServiceInfoResponse:
        """The service now; as last known where it does not answer.

        Raises ``ServiceUnavailable`` where it never did.
        """
        try:
            async with self.endpoint.channel() as channel:
                return await self._ask_info(channel)
        except ServiceUnavailable:
            if self.info is None:
                raise
            return self.info

    async def run(self) -> None:
        """Keeps the connection up until cancelled or closed."""
        backoff = FIRST_BACKOFF
        while not self._closing:
            try:
                async with self.endpoint.channel() as channel:
                    await self._open(channel)
                    backoff = FIRST_BACKOFF
                    await self._read()
            except OutriderError as error:
                self._failed(error)
            except grpc.aio.AioRpcError as error:
                self._failed(ServiceUnavailable(_reason(error)))
            finally:
                self._down("the connection was closed" if self._closing else "the stream ended")
            if not self._closing:
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, LAST_BACKOFF)

    async def reached(self, seconds: float) -> None:
        """Waits until it is up; raises what keeps it down."""
        try:
            async with asyncio.timeout(seconds):
                while not self.up:
                    if isinstance(self.failure, ConfigError):
                        raise self.failure
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            raise self.failure or ServiceUnavailable(
                f"the {self.role} service at {self.endpoint.target} did not answer in {seconds:g} s"
            ) from None

    async def close(self, timeout: float = 2.0) -> None:
        """Says goodbye: the service frees what this stream held and ends it."""
        self._closing = True
        call = self._call
        if not self.up or call is None:
            return
        goodbye = self._goodbye()
        with contextlib.suppress(Exception):
            async with asyncio.timeout(timeout):
                future = await self.send(goodbye)
                await future
                await call.done_writing()

    # --- the stream --------------------------------------------------------------------------

    async def _write(self, call: Any, request: RequestT) -> None:
        self.at_rest.clear()
        try:
            await call.write(request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError) as error:
            self._down(f"writing failed: {_reason(error)}")
        finally:
            self.at_rest.set()

    async def _open(self, channel: grpc.aio.Channel) -> None:
        info = await self._ask_info(channel)
        if info.protocol != PROTOCOL:
            raise ProtocolError(
                f"the {self.role} service at {self.endpoint.target} speaks protocol "
                f"{info.protocol}, this coordinator {PROTOCOL}: run the same version of Outrider"
            )
        self._check(info)
        self.info = info
        self._call = self._stub(channel).Rounds(metadata=self.endpoint.metadata)
        self.failure = None
        self.up = True
        log.info("%s service at %s: %s", self.role, self.endpoint.target, info.model.name)
        self._changed(True, "")

    async def _ask_info(self, channel: grpc.aio.Channel) -> pb.ServiceInfoResponse:
        try:
            info: pb.ServiceInfoResponse = await self._stub(channel).Info(
                pb.ServiceInfoRequest(), timeout=INFO_TIMEOUT, metadata=self.endpoint.metadata
            )
            return info
        except grpc.aio.AioRpcError as error:
            raise ServiceUnavailable(
                f"the {self.role} service at {self.endpoint.target} can't be reached: "
                f"{_reason(error)}"
            ) from None

    async def _read(self) -> None:
        """Hands answers to those who wait for them, until the stream ends."""
        call = self._call
        watch = asyncio.create_task(self._watch(call))
        try:
            while True:
                response = await call.read()
                if response is grpc.aio.EOF:
                    return
                waiting = self._pending.get(response.round)
                if waiting is None:
                    raise ProtocolError(
                        f"the {self.role} service answered round {response.round}, "
                        "which was not asked"
                    )
                if waiting.each is not None:
                    waiting.each(response)
                    if not response.HasField("grant_end"):
                        waiting.sent = time.monotonic()
                        continue
                del self._pending[response.round]
                if not waiting.future.done():
                    waiting.future.set_result(response)
                elif waiting.late is not None:
                    waiting.late(response)
        except asyncio.CancelledError:
            # gRPC raises this as well, for a call that was cancelled under the reader.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
        finally:
            watch.cancel()
            call.cancel()

    async def _watch(self, call: Any) -> None:
        """Ends the stream when an answer is overdue: a service may hang without dying."""
        pause = min(1.0, self.endpoint.timeout / 10)
        while True:
            await asyncio.sleep(pause)
            if self._pending:
                since = min(one.sent for one in self._pending.values())
                if time.monotonic() - since > self.endpoint.timeout:
                    self._down(f"no answer within {self.endpoint.timeout:g} s")
                    call.cancel()
                    return

    def _failed(self, error: OutriderError) -> None:
        level = logging.ERROR if isinstance(error, ConfigError) else logging.DEBUG
        if str(error) != str(self.failure):
            log.log(level, "%s", error)
        self.failure = error
        if self.up:
            self._down(str(error))

    def _down(self, reason: str) -> None:
        if not self.up:
            return
        self.up = False
        self._call = None
        if self.failure is None:
            self.failure = ServiceUnavailable(f"the {self.role} service is away: {reason}")
        pending, self._pending = self._pending, {}
        for one in pending.values():
            if one.each is not None:
                one.each(None)
            if not one.future.done():
                one.future.set_exception(ServiceUnavailable(f"the {self.role} service: {reason}"))
                one.future.exception()  # nobody may be waiting any more
        if not self._closing:
            log.warning("lost the %s service: %s", self.role, reason)
        self._changed(False, reason)

    def _stub(self, channel: grpc.aio.Channel) -> Any:
        return (pb_grpc.DraftStub if self.role == "draft" else pb_grpc.VerifyStub)(channel)

    def _goodbye(self) -> Any:
        kind = pb.DraftRequest if self.role == "draft" else pb.VerifyRequest
        return kind(round=self.next_number(), goodbye=True)


DraftConnection = Connection[pb.DraftRequest, pb.DraftResponse]
VerifyConnection = Connection[pb.VerifyRequest, pb.VerifyResponse]


def _reason(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.details()} [{error.code().name}]"
    return str(error) or type(error).__name__
