"""Keeps work going while its results are handed on."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")
_STEP_SECONDS = 0.02


def ahead(items: Generator[Item, None, None], most: int) -> Iterator[Item]:
    """The same items, made on a thread of their own that is at most ``most`` of them ahead.

    For a gRPC handler that streams what a model makes: gRPC returns to the handler only when a
    message has gone out, and the model would stand still that long. What ``items`` raises is
    raised here. A reader that leaves early closes ``items`` at the next one, and waits for that.
    """
    made: queue.Queue[Item] = queue.Queue(most)
    over = threading.Event()
    left = threading.Event()
    raised: list[BaseException] = []

    def work() -> None:
        try:
            with contextlib.closing(items):
                for one in items:
                    made.put(one)
                    if left.is_set():
                        return
        except BaseException as error:
            raised.append(error)
        finally:
            over.set()
            made.put(_END)

    thread = threading.Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        while (one := made.get()) is not _END:
            yield one
    finally:
        left.set()
        while not over.is_set():
            with contextlib.suppress(queue.Empty):
                made.get(timeout=_STEP_SECONDS)  # makes room: it may be waiting to put one
        with contextlib.suppress(queue.Empty):
            while True:
                made.get_nowait()
        thread.join()
    if raised:
        raise raised[0]


_END: Any = object()
