"""Interceptors around every handler: bearer token first, then errors to status.

One for sync servers, one for asyncio servers; both keep a handler's own shape.
"""

from __future__ import annotations

import hmac
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
import grpc.aio

from outrider.shared.core.errors import OutriderError
from outrider.shared.process.grpc_status import to_status, unexpected

log = logging.getLogger(__name__)

# Probes of an orchestrator carry no token.
_OPEN_TO_ALL = "/grpc.health.v1.Health/"


def _refused(details: Any, token: str | None) -> str | None:
    """Why a call may not pass, or None."""
    if token is None or details.method.startswith(_OPEN_TO_ALL):
        return None
    for key, value in details.invocation_metadata or ():
        if key == "authorization":
            scheme, _, given = str(value).partition(" ")
            if scheme.lower() == "bearer" and hmac.compare_digest(
                given.strip().encode(), token.encode()
            ):
                return None
            return "the bearer token is not the server's"
    return "a bearer token is required: send metadata 'authorization: Bearer TOKEN'"


def _rebuilt(handler: Any, wrap: Callable[[Callable[..., Any], bool], Callable[..., Any]]) -> Any:
    for name in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
        behavior = getattr(handler, name)
        if behavior is not None:
            make = getattr(grpc, f"{name}_rpc_method_handler")
            return make(
                wrap(behavior, handler.response_streaming),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
    return handler


class SyncGuard(grpc.ServerInterceptor):
    """For ``grpc.server``."""

    def __init__(self, token: str | None = None) -> None:
        """``token``: the bearer token that calls must carry; None lets all pass."""
        self._token = token

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Wraps the handler of one call."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        reason = _refused(handler_call_details, self._token)
        if reason is not None:
            return _rebuilt(handler, lambda _, streaming: _sync_refusal(reason, streaming))
        if handler_call_details.method.startswith(_OPEN_TO_ALL):
            return handler  # its Watch uses a calling convention of its own
        return _rebuilt(handler, _sync_wrap)


def _sync_refusal(reason: str, streaming: bool) -> Callable[..., Any]:
    def refuse(request: Any, context: grpc.ServicerContext) -> Any:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, reason)

    def refuse_stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, reason)
        yield

    return refuse_stream if streaming else refuse


def _sync_wrap(behavior: Callable[..., Any], streaming: bool) -> Callable[..., Any]:
    def call(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return behavior(request, context)
        except Exception as error:
            _sync_abort(error, context)

    def stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            yield from behavior(request, context)
        except Exception as error:
            _sync_abort(error, context)

    return stream if streaming else call


def _sync_abort(error: Exception, context: Any) -> None:
    if isinstance(error, OutriderError):
        code, message, trailer = to_status(error)
        context.set_trailing_metadata(trailer)
        context.abort(code, message)
    # context.abort raises a bare Exception; after a cancellation the request iterator raises
    # one of gRPC's own. Neither is news.
    if context.code() is not None or not context.is_active():
        raise error
    context.abort(*unexpected(error, log))


class AioGuard(grpc.aio.ServerInterceptor):
    """For ``grpc.aio.server``."""

    def __init__(self, token: str | None = None) -> None:
        """``token``: the bearer token that calls must carry; None lets all pass."""
        self._token = token

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Wraps the handler of one call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        reason = _refused(handler_call_details, self._token)
        if reason is not None:
            return _rebuilt(handler, lambda _, streaming: _aio_refusal(reason, streaming))
        return _rebuilt(handler, _aio_wrap)


def _aio_refusal(reason: str, streaming: bool) -> Callable[..., Any]:
    async def refuse(request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, reason)

    async def refuse_stream(request: Any, context: Any) -> AsyncIterator[Any]:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, reason)
        yield

    return refuse_stream if streaming else refuse


def _aio_wrap(behavior: Callable[..., Any], streaming: bool) -> Callable[..., Any]:
    # Also for streams written with context.write: those are plain coroutines. Reflection's
    # sync generators run unwrapped, on gRPC's own thread pool.
    if not streaming or inspect.iscoroutinefunction(behavior):

        async def call(request: Any, context: Any) -> Any:
            try:
                answer = behavior(request, context)
                return await answer if isinstance(answer, Awaitable) else answer
            except Exception as error:
                await _aio_abort(error, context)

        return call
    if not inspect.isasyncgenfunction(behavior):
        return behavior

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for answer in behavior(request, context):
                yield answer
        except Exception as error:
            await _aio_abort(error, context)

    return stream


async def _aio_abort(error: Exception, context: Any) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, OutriderError):
        code, message, trailer = to_status(error)
        await context.abort(code, message, trailer)
    await context.abort(*unexpected(error, log))
