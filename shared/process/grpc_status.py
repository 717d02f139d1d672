"""Errors as gRPC status: the code, a message for a person, and google.rpc details.

The rich status travels in the trailer ``grpc-status-details-bin``, which every gRPC
language's status library reads.
"""

from __future__ import annotations

import re
import uuid
from logging import Logger
from typing import Any

import grpc

from outrider.shared.core.errors import (
    CapacityError,
    InvalidRequest,
    OutriderError,
    ServiceUnavailable,
)

DETAILS_KEY = "grpc-status-details-bin"
DOMAIN = "outrider"
# HTTP/2 headers are small: 8 KiB in all is what peers accept by default, and the message
# travels twice, in its own header and in the details.
MAX_MESSAGE = 1500

Trailer = tuple[tuple[str, str | bytes], ...]


def to_status(error: OutriderError) -> tuple[grpc.StatusCode, str, Trailer]:
    """Code, message and trailing metadata that tell a client of ``error``."""
    from google.protobuf import any_pb2, duration_pb2
    from google.rpc import error_details_pb2, status_pb2

    code = grpc.StatusCode[error.status]
    message = _short(str(error))
    reason = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(error).__name__).upper()
    info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)
    details: list[Any] = [info]
    if isinstance(error, InvalidRequest):
        info.metadata["field"] = error.field
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field=error.field, description=_short(f"must be {error.allowed}")
                    )
                ]
            )
        )
    waiting_helps = isinstance(error, ServiceUnavailable)
    if isinstance(error, CapacityError):
        info.metadata["permanent"] = str(error.permanent).lower()
        waiting_helps = not error.permanent
    if waiting_helps:
        delay = duration_pb2.Duration(seconds=1)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        any_message = any_pb2.Any()
        any_message.Pack(detail)
        packed.append(any_message)
    status = status_pb2.Status(code=code.value[0], message=message, details=packed)
    return code, message, ((DETAILS_KEY, status.SerializeToString()),)


def unexpected(error: BaseException, log: Logger) -> tuple[grpc.StatusCode, str]:
    """Logs ``error`` with its traceback under an opaque id; the client only learns the id."""
    number = uuid.uuid4().hex[:12]
    log.error("internal error %s", number, exc_info=error)
    return grpc.StatusCode.INTERNAL, f"internal error {number}; the server's log has the details"


def message_of(error: grpc.RpcError) -> str:
    """What to show a person of a failed call."""
    code = error.code() if hasattr(error, "code") else None
    details = (error.details() if hasattr(error, "details") else None) or str(error)
    return details if code is None else f"{details} [{code.name}]"


def _short(text: str) -> str:
    # Header values are percent-encoded; a control character in them helps nobody.
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…"
