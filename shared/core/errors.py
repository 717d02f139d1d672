"""Every error Outrider raises on purpose.

::

    OutriderError                    INTERNAL
    ├── InvalidRequest               INVALID_ARGUMENT     a field of a request is out of range
    ├── CapacityError                RESOURCE_EXHAUSTED   it does not fit, now or ever
    ├── ConfigError                  FAILED_PRECONDITION  flags, files or models that can't work
    │   └── VocabularyMismatch                            draft and base do not share a vocabulary
    ├── SequenceRefused              FAILED_PRECONDITION  one sequence of a round was refused
    ├── ServiceUnavailable           UNAVAILABLE          a peer is away
    └── ProtocolError                FAILED_PRECONDITION  a peer broke the protocol

Each class carries the gRPC status it is answered with, by name, so that code
without gRPC can raise it. The message names the field, the value and what is allowed.
"""

from __future__ import annotations

from enum import IntEnum


class OutriderError(Exception):
    """Root of all errors raised on purpose; ``status`` is a ``grpc.StatusCode`` name."""

    status = "INTERNAL"


class InvalidRequest(OutriderError):
    """A field of a request is out of range."""

    status = "INVALID_ARGUMENT"

    def __init__(self, field: str, value: object, allowed: str) -> None:
        """``field`` is the dotted proto path, ``allowed`` what the value must be."""
        shown = repr(value)
        if len(shown) > 120:
            shown = shown[:117] + "..."
        super().__init__(f"{field}: got {shown}; must be {allowed}")
        self.field = field
        self.value = value
        self.allowed = allowed


class CapacityError(OutriderError):
    """Memory or a queue is full; ``permanent`` when waiting would not help."""

    status = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


class ConfigError(OutriderError):
    """Flags, files or models that can't work."""

    status = "FAILED_PRECONDITION"


class VocabularyMismatch(ConfigError):
    """Draft and base do not share a vocabulary."""


class RefusalCode(IntEnum):
    """Why a sequence was refused; the numbers of ``outrider.v1.SequenceErrorCode``."""

    UNKNOWN = 1
    STALE_EPOCH = 2
    KV_MISSING = 3
    NO_CAPACITY = 4
    INVALID = 5
    MODEL = 6
    NOTHING_ALLOWED = 7


class SequenceRefused(OutriderError):
    """One sequence of a round was refused; the others are served."""

    status = "FAILED_PRECONDITION"

    def __init__(self, code: RefusalCode, message: str, *, held_len: int = 0) -> None:
        """``held_len``: for ``KV_MISSING``, the tokens whose KV is held."""
        super().__init__(message)
        self.code = code
        self.held_len = held_len


class ServiceUnavailable(OutriderError):
    """A peer is away."""

    status = "UNAVAILABLE"


class ProtocolError(OutriderError):
    """A peer broke the protocol."""

    status = "FAILED_PRECONDITION"


def first_line(error: BaseException) -> str:
    """The first line of what ``error`` says; its kind where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
