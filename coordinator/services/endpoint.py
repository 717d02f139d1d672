"""Where the model services are, and how they are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from outrider.shared.config.schema import CoordinatorConfig
from outrider.shared.process import grpc_server


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How to reach a service."""

    role: str
    """"draft" or "verify"."""
    target: str
    timeout: float
    """Seconds after which a round without an answer counts as lost."""
    options: tuple[tuple[str, Any], ...] = ()
    credentials: grpc.ChannelCredentials | None = None
    metadata: tuple[tuple[str, str], ...] = ()

    def channel(self) -> grpc.aio.Channel:
        """A fresh channel: a new connection, without the back-off of an old one."""
        return grpc_server.client_channel(self.target, self.credentials, self.options)


def endpoint_of(config: CoordinatorConfig, role: str, target: str, timeout: float) -> Endpoint:
    """The endpoint of one service, by what ``config`` says of both."""
    return Endpoint(
        role,
        target,
        timeout,
        options=tuple(
            grpc_server.client_options(
                max_message_bytes=config.max_message_bytes,
                keepalive_seconds=config.keepalive_seconds,
            )
        ),
        credentials=grpc_server.channel_credentials(
            config.services_ca, config.services_certificate, config.services_key
        ),
        metadata=grpc_server.authorization(config.services_token),
    )
