"""What became of one request, as the client saw it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


class RequestFailed(Exception):
    """A request was refused or broke off. ``reason`` is short, the same for the same cause."""

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(message or reason)
        self.reason = reason


@dataclass(slots=True)
class Answer:
    """Times of one request, in seconds of ``time.perf_counter``.

    ``due``: when it should have been sent, where arrivals are open; ``messages``: when each
    message with tokens arrived. ``failure`` is why it failed, with ``ended`` set; without
    ``ended`` it was still running when the measurement was interrupted.
    """

    sent: float
    due: float | None = None
    messages: list[float] = field(default_factory=list)
    ended: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    failure: str | None = None
    failure_message: str = ""
    rounds: int = 0
    proposed: int = 0
    accepted: int = 0

    def message(self) -> None:
        """A message with at least one token is here."""
        self.messages.append(time.perf_counter())

    @property
    def completed(self) -> bool:
        """Whether it was answered to its end."""
        return self.ended is not None and self.failure is None

    @property
    def tokens(self) -> int:
        """New tokens: as the server counts them, else one a message."""
        return len(self.messages) if self.output_tokens is None else self.output_tokens

    @property
    def e2e(self) -> float:
        """Seconds from sending to the end of a completed request."""
        assert self.ended is not None
        return self.ended - self.sent

    @property
    def ttft(self) -> float | None:
        """Seconds from sending to the first token."""
        return self.messages[0] - self.sent if self.messages else None

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first, on average; None without a second token."""
        if not self.messages or self.tokens < 2:
            return None
        return (self.messages[-1] - self.messages[0]) / (self.tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between a message with tokens and the next."""
        return [b - a for a, b in zip(self.messages, self.messages[1:], strict=False)]
