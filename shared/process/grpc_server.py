"""One way to start a gRPC server, and one way to reach it.

Health, reflection, TLS, bearer token, error mapping, limits and drain are the same for all
parts. Model services are sync servers: each ``Rounds`` stream has a thread of its own that
runs the engine directly, which is quicker than handing each round from an event loop to a
worker. The coordinator is an asyncio server.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from outrider.shared.config.schema import ServeConfig
from outrider.shared.core.errors import ConfigError
from outrider.shared.process import address
from outrider.shared.process.interceptors import AioGuard, SyncGuard

log = logging.getLogger(__name__)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def server_options(config: ServeConfig) -> list[tuple[str, int]]:
    """Channel arguments of a server."""
    keepalive = int(config.keepalive_seconds * 1000)
    return [
        # On Linux two servers could otherwise share a port, each getting some of the calls.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.keepalive_time_ms", keepalive),
        ("grpc.keepalive_timeout_ms", max(1000, keepalive // 2)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ]


def client_options(
    *, max_message_bytes: int = 64 << 20, keepalive_seconds: float = 20.0
) -> list[tuple[str, int]]:
    """Channel arguments of a client; the counterpart of ``server_options``."""
    keepalive = int(keepalive_seconds * 1000)
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", keepalive),
        ("grpc.keepalive_timeout_ms", max(1000, keepalive // 2)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # A service that comes back is noticed within a second.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        # One connection per channel: a private socket's peer must not be shared by accident.
        ("grpc.use_local_subchannel_pool", 1),
    ]


def channel_credentials(
    ca: str | None, certificate: str | None = None, key: str | None = None
) -> grpc.ChannelCredentials | None:
    """TLS for a client, or None without ``ca``; ``certificate`` and ``key`` make it mutual."""
    if ca is None:
        return None
    return grpc.ssl_channel_credentials(
        _read(ca, "ca"),
        _read(key, "key") if key else None,
        _read(certificate, "certificate") if certificate else None,
    )


def client_channel(
    target: str,
    credentials: grpc.ChannelCredentials | None,
    options: Sequence[tuple[str, Any]],
) -> grpc.aio.Channel:
    """A channel, with TLS where there are ``credentials``."""
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, credentials, options=options)


def authorization(token: str | None) -> tuple[tuple[str, str], ...]:
    """Call metadata that carries the bearer token."""
    return () if token is None else (("authorization", f"Bearer {token}"),)


def server_credentials(config: ServeConfig) -> grpc.ServerCredentials | None:
    """TLS for a server, or None where none is configured; raises ``ConfigError``."""
    if config.tls_certificate is None and config.tls_key is None:
        if config.tls_client_ca is not None:
            raise ConfigError("tls_client_ca is set; tls_certificate and tls_key must be too")
        return None
    if config.tls_certificate is None or config.tls_key is None:
        raise ConfigError("tls_certificate and tls_key must be set together")
    client_ca = _read(config.tls_client_ca, "tls_client_ca") if config.tls_client_ca else None
    pair = (_read(config.tls_key, "tls_key"), _read(config.tls_certificate, "tls_certificate"))
    return grpc.ssl_server_credentials(
        [pair], root_certificates=client_ca, require_client_auth=client_ca is not None
    )


def _read(path: str, key: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{key} = {path!r}: can't be read: {error.strerror or error}") from None


def _bind(server: Any, config: ServeConfig) -> address.Address:
    """Binds ``server`` and returns where; raises ``ConfigError``."""
    wanted = address.parse(config.listen)
    credentials = server_credentials(config)
    if credentials is None and not wanted.local:
        log.warning("%s is open to the network without TLS", wanted)
    address.claim(wanted)
    # A unix socket is this user's alone.
    mask = os.umask(0o177) if wanted.path is not None else None
    try:
        if credentials is None:
            port = server.add_insecure_port(str(wanted))
        else:
            port = server.add_secure_port(str(wanted), credentials)
    except RuntimeError as error:
        raise ConfigError(f"listen: {wanted}: can't be bound: {error}") from None
    finally:
        if mask is not None:
            os.umask(mask)
    if wanted.path is not None:
        return wanted
    return address.Address(host=wanted.host, port=port)


def _reflect(server: Any, names: Sequence[str]) -> None:
    from grpc_reflection.v1alpha import reflection

    reflection.enable_server_reflection(
        (*names, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )


class Server:
    """A sync server. Bound on construction; healthy from ``serving()`` until ``drain``."""

    def __init__(
        self, config: ServeConfig, add: Callable[[grpc.Server], None], names: Sequence[str]
    ) -> None:
        """``add`` registers the servicers, ``names`` are their full names; ``ConfigError``."""
        self._config = config
        self._names = names
        self._server = grpc.server(
            ThreadPoolExecutor(config.max_calls, thread_name_prefix="rpc"),
            interceptors=[SyncGuard(config.token)],
            options=server_options(config),
            # Calls beyond the threads would wait unseen; this refuses them instead.
            maximum_concurrent_rpcs=config.max_calls,
        )
        self._health = health.HealthServicer()
        self._mark(_NOT_SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        add(self._server)
        if config.reflection:
            _reflect(self._server, names)
        self.address = _bind(self._server, config)
        self._server.start()

    def serving(self) -> None:
        """Calls are welcome from now on, says health."""
        self._mark(_SERVING)

    def drain(self, idle: Callable[[], bool] = lambda: False, grace: float | None = None) -> None:
        """Refuses new calls, lets running ones end up to ``grace`` seconds, then cancels them.

        ``grace`` defaults to the configured drain time; ``idle`` may say earlier that nothing
        is left to wait for. Blocks until the server has stopped.
        """
        self._health.enter_graceful_shutdown()
        grace = self._config.drain_seconds if grace is None else grace
        until = time.monotonic() + grace
        stopped = self._server.stop(grace)
        while not stopped.wait(0.02):
            if time.monotonic() >= until or idle():
                self._server.stop(None).wait()
                break
        address.release(self.address)

    def _mark(self, status: Any) -> None:
        for name in ("", *self._names):
            self._health.set(name, status)


class AioServer:
    """An asyncio server with the same face; make it inside a running event loop."""

    def __init__(
        self, config: ServeConfig, add: Callable[[grpc.aio.Server], None], names: Sequence[str]
    ) -> None:
        """``add`` registers the servicers, ``names`` are their full names; ``ConfigError``."""
        self._config = config
        self._names = names
        self._server = grpc.aio.server(
            interceptors=(AioGuard(config.token),),
            options=server_options(config),
            maximum_concurrent_rpcs=None,
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        add(self._server)
        if config.reflection:
            _reflect(self._server, names)
        self.address = _bind(self._server, config)

    async def start(self) -> None:
        """Starts to answer; health says NOT_SERVING until ``serving``."""
        await self._mark(_NOT_SERVING)
        await self._server.start()

    async def serving(self, yes: bool = True) -> None:
        """Calls are welcome from now on, or not, says health."""
        await self._mark(_SERVING if yes else _NOT_SERVING)

    async def drain(self, grace: float | None = None) -> None:
        """Refuses new calls, lets running ones end up to ``grace`` seconds, then cancels them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(self._config.drain_seconds if grace is None else grace)
        await asyncio.to_thread(address.release, self.address)

    async def _mark(self, status: Any) -> None:
        for name in ("", *self._names):
            await self._health.set(name, status)
