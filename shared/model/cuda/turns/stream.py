"""A device's queue of work as turns need it: launches, and waits and writes between them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

from outrider.shared.link.device.driver import bindings, check, on_device
from outrider.shared.model.cuda.graphs import Graphs


class Mark(Protocol):
    """A point in a stream."""

    def reached(self) -> bool:
        """Whether the device is past it."""
        ...

    def wait(self) -> None:
        """Until the device is past it."""
        ...

    def seconds_after(self, earlier: Any) -> float:
        """Device time between two marks that were reached."""
        ...


class DeviceStream(Protocol):
    """A device's queue of work, with waits and writes in it; see ``CudaStream``."""

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


class CudaMark:
    """A point in a stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record(stream)

    def reached(self) -> bool:
        """Whether the device is past it."""
        return bool(self._event.query())

    def wait(self) -> None:
        """Until the device is past it."""
        self._event.synchronize()

    def seconds_after(self, earlier: CudaMark) -> float:
        """Device time between two marks that were reached."""
        return float(earlier._event.elapsed_time(self._event)) / 1e3


class CudaStream:
    """The model's stream, with waits and writes between its launches; see ``DeviceStream``."""

    def __init__(self, device: torch.device, graphs: Graphs) -> None:
        """``graphs``: where the launches are captured."""
        self._device, self._graphs = device, graphs
        # Work queued here runs although the model's stream stands still.
        self._beside = torch.cuda.Stream(device, priority=-1)

    def run(self, key: Hashable, chain: Callable[[], None]) -> None:
        """Queues a chain of launches."""
        with on_device(self._device):
            self._graphs.run(key, chain)

    def wait(self, bell: Tensor, value: int) -> None:
        """Whatever is queued from now on waits until ``bell`` (int64 [1]) is ``value`` or more."""
        driver = bindings()
        flags = int(driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ)
        stream = torch.cuda.current_stream(self._device)
        with on_device(self._device):
            queued = driver.cuStreamWaitValue64(
                driver.CUstream(stream.cuda_stream), bell.data_ptr(), value, flags
            )
        check("cuStreamWaitValue64", *queued)

    def write(self, bell: Tensor, value: int) -> None:
        """Writes ``value`` when everything queued before is complete and can be seen."""
        self._write(torch.cuda.current_stream(self._device), bell, value)

    def release(self, bell: Tensor, value: int) -> None:
        """Writes ``value`` now, so that a wait for ``bell`` ends."""
        self._write(self._beside, bell, value)
        self._beside.synchronize()

    def mark(self) -> CudaMark:
        """A mark after everything queued so far."""
        return CudaMark(torch.cuda.current_stream(self._device))

    def _write(self, stream: torch.cuda.Stream, bell: Tensor, value: int) -> None:
        driver = bindings()
        flags = int(driver.CUstreamWriteValue_flags.CU_STREAM_WRITE_VALUE_DEFAULT)
        with on_device(self._device):
            queued = driver.cuStreamWriteValue64(
                driver.CUstream(stream.cuda_stream), bell.data_ptr(), value, flags
            )
        check("cuStreamWriteValue64", *queued)
