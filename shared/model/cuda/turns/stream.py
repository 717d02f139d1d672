"""A device's queue of work as turns need it: launches, and waits and writes between them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol

from torch import Tensor


class Mark(Protocol):
    """A point in a stream."""

    def reached(self) -> bool:
        """Whether the device is past it."""
        ...

    def seconds_after(self, earlier: Any) -> float:
        """Device time between two marks that were reached."""
        ...


class Stream(Protocol):
    """A device's queue of work, with waits and writes in it; see ``cuda_ipc.CudaStream``."""

    def run(self, key: Hashable, chain: Callable[[], None]) -> None:
        """Queues a chain of launches, always the same for the same key."""
        ...

    def wait(self, bell: Tensor, value: int) -> None:
        """Whatever is queued from now on waits until ``bell`` (int64 [1]) is ``value`` or more."""
        ...

    def write(self, bell: Tensor, value: int) -> None:
        """Writes ``value`` when everything queued before is complete."""
        ...

    def release(self, bell: Tensor, value: int) -> None:
        """Writes ``value`` now, whatever the queue waits for."""
        ...

    def mark(self) -> Mark:
        """A mark after everything queued so far."""
        ...
