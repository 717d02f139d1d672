"""A device played by the host: its stream, its memory shared between processes, its runner.

The kernels' references run on a thread, in queue order. What that leaves out is CUDA itself.
"""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from outrider.kernels import registry
from outrider.kernels.operation import Tools
from outrider.shared.link.device.cuda_ipc import HANDLE_BYTES
from outrider.shared.link.device.driver import CudaDriverError
from outrider.shared.model.cuda.runner import CudaRunner


class HostMark:
    """A point in a ``HostStream``."""

    def __init__(self) -> None:
        self.event, self.at = threading.Event(), 0.0

    def reached(self) -> bool:
        return self.event.is_set()

    def wait(self) -> None:
        self.event.wait()

    def seconds_after(self, earlier: HostMark) -> float:
        return self.at - earlier.at

    def reach(self) -> None:
        self.at = time.perf_counter()
        self.event.set()


class HostStream:
    """Plays a device's stream: a thread that does what is queued, in order, and may wait."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.keys: set[Any] = set()
        self.failed: list[Exception] = []

    def run(self, key: Any, chain: Callable[[], None]) -> None:
        self.keys.add(key)
        self._work.put(chain)

    def wait(self, bell: torch.Tensor, value: int) -> None:
        def until() -> None:
            while int(bell.item()) < value:
                time.sleep(1e-5)

        self._work.put(until)

    def write(self, bell: torch.Tensor, value: int) -> None:
        self._work.put(lambda: bell.fill_(value))

    def release(self, bell: torch.Tensor, value: int) -> None:
        bell.fill_(value)

    def mark(self) -> HostMark:
        made = HostMark()
        self._work.put(made.reach)
        return made

    def hold(self, gate: threading.Event) -> None:
        """What is queued from now on waits for ``gate``."""
        self._work.put(lambda: gate.wait(20))

    def stop(self) -> None:
        self._work.put(None)
        self._thread.join(10)
        assert not self._thread.is_alive(), "something in the stream waits for ever"
        assert not self.failed, self.failed

    def _run(self) -> None:
        with torch.inference_mode():
            while (one := self._work.get()) is not None:
                try:
                    one()
                except Exception as error:  # as on a device: later work goes on, the host is told
                    self.failed.append(error)


@dataclass
class Allocation:
    """As ``cuda_ipc.SharedMemory``."""

    tensor: torch.Tensor
    handle: bytes


class HostMemory:
    """Plays ``cuda_ipc`` for two sides in one process: a handle opens the very same memory."""

    def __init__(self) -> None:
        self.allocated: dict[bytes, torch.Tensor] = {}

    def device_uuid(self, device: torch.device) -> str:
        return "the host"

    def why_not(self, device: torch.device) -> str | None:
        return None

    def allocate(self, size: int, device: torch.device) -> Allocation:
        handle = secrets.token_bytes(HANDLE_BYTES)
        self.allocated[handle] = torch.randint(0, 255, (size,), dtype=torch.uint8)
        return Allocation(self.allocated[handle], handle)

    def open_handle(self, raw: bytes, size: int, device: torch.device) -> Allocation:
        found = self.allocated.get(raw)
        if found is None or found.numel() != size:
            raise CudaDriverError("cuIpcOpenMemHandle: invalid handle")
        return Allocation(found, b"")

    def complete(self, device: torch.device) -> None:
        pass


class HostedRunner(CudaRunner):
    """The CUDA runner over the references of its kernels; ``streams``: one for each mailbox."""

    streams: list[HostStream]

    def turns(self, kind: Any, mailbox: Any, stream: Any = None) -> Any:
        self.streams.append(HostStream())
        return super().turns(kind, mailbox, self.streams[-1])

    def stop(self) -> None:
        while self.streams:
            self.streams.pop().stop()


def hosted(plain: Any, max_k: int) -> HostedRunner:
    """A runner of the Llama family's model ``plain``, played by the host."""
    calls = {
        name: next(i for i in operation.implementations if i.name == "torch").build(
            Tools(torch.device("cpu"))
        )
        for name, operation in registry.operations().items()
    }
    made = HostedRunner(plain._model, plain.facts, plain.storage, max_k=max_k, calls=calls)
    made.streams = []
    return made
