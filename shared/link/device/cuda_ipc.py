"""Device memory that two processes share, and streams that wait for what is written there.

Raw 64-byte handles of CUDA's inter-process communication; nothing is pickled. The waiting and
the writing are stream memory operations, so that one process's device waits for the other's
while no processor looks on.

Sources: CUDA driver API, sections "IPC" (6.14) and "Stream memory operations" (6.19).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from outrider.shared.core.errors import OutriderError
from outrider.shared.model.cuda.graphs import Graphs

HANDLE_BYTES = 64


class CudaIpcError(OutriderError):
    """Device memory can't be shared; the message says why."""

    status = "FAILED_PRECONDITION"


@dataclass(slots=True)
class SharedMemory:
    """Device memory of one's own or of another process, until ``close``."""

    tensor: Tensor | None
    """uint8 [bytes]."""
    handle: bytes
    """What another process opens it by; empty where it is not one's own."""
    pointer: int

    def __del__(self) -> None:
        """Whoever forgets it has given it back."""
        with contextlib.suppress(Exception):
            self.close()

    def close(self) -> None:
        """Gives it back, once the device is done with it."""
        if self.tensor is None:
            return
        driver = _driver()
        torch.cuda.synchronize(self.tensor.device)
        self.tensor = None
        if self.handle:
            _check("cuMemFree", *driver.cuMemFree(self.pointer))
        else:
            _check("cuIpcCloseMemHandle", *driver.cuIpcCloseMemHandle(self.pointer))


def why_not(device: torch.device) -> str | None:
    """Why device memory can't be shared there; None where it can."""
    if device.type != "cuda":
        return f"the model runs on {device.type}"
    try:
        driver = _driver()
        with _context(device):
            own = _check("cuCtxGetDevice", *driver.cuCtxGetDevice())
            asked = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS
            able = _check("cuDeviceGetAttribute", *driver.cuDeviceGetAttribute(asked, own))
    except CudaIpcError as error:
        return str(error)
    return None if able else "the device has no 64-bit stream memory operations"


def device_uuid(device: torch.device) -> str:
    """The device's own identity, the same in every process, whatever number it has there."""
    return str(torch.cuda.get_device_properties(device).uuid)


def allocate(size: int, device: torch.device) -> SharedMemory:
    """Memory that another process may open. Raises ``CudaIpcError``."""
    driver = _driver()
    with _context(device):
        # An allocation of its own: a handle of torch's pool would give all of the pool away.
        pointer = int(_check("cuMemAlloc", *driver.cuMemAlloc(size)))
        try:
            handle = _check("cuIpcGetMemHandle", *driver.cuIpcGetMemHandle(pointer))
        except CudaIpcError:
            driver.cuMemFree(pointer)
            raise
        raw = ctypes.string_at(handle.getPtr(), HANDLE_BYTES)
        return SharedMemory(_tensor(pointer, size, device), raw, pointer)


def open_handle(raw: bytes, size: int, device: torch.device) -> SharedMemory:
    """Another process's memory. Raises ``CudaIpcError``."""
    if len(raw) != HANDLE_BYTES:
        raise CudaIpcError(f"a handle of {len(raw)} bytes; it must have {HANDLE_BYTES}")
    driver = _driver()
    handle = driver.CUipcMemHandle()
    ctypes.memmove(handle.getPtr(), raw, HANDLE_BYTES)
    with _context(device):
        flags = int(driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS)
        opened = driver.cuIpcOpenMemHandle(handle, flags)
        pointer = int(_check("cuIpcOpenMemHandle", *opened))
        return SharedMemory(_tensor(pointer, size, device), b"", pointer)


def complete(device: torch.device) -> None:
    """Waits until all that was queued is done: then another process can see what it wrote."""
    torch.cuda.current_stream(device).synchronize()


class CudaMark:
    """A point in a stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record(stream)

    def reached(self) -> bool:
        """Whether the device is past it."""
        return bool(self._event.query())

    def seconds_after(self, earlier: CudaMark) -> float:
        """Device time between two marks that were reached."""
        return float(earlier._event.elapsed_time(self._event)) / 1e3


class CudaStream:
    """The model's stream, with waits and writes between its launches; see ``turns.Stream``."""

    def __init__(self, device: torch.device, graphs: Graphs) -> None:
        """``graphs``: where the launches are captured."""
        self._device, self._graphs = device, graphs
        # Work queued here runs although the model's stream stands still.
        self._beside = torch.cuda.Stream(device, priority=-1)

    def run(self, key: Hashable, chain: Callable[[], None]) -> None:
        """Queues a chain of launches."""
        with _context(self._device):
            self._graphs.run(key, chain)

    def wait(self, bell: Tensor, value: int) -> None:
        """Whatever is queued from now on waits until ``bell`` (int64 [1]) is ``value`` or more."""
        driver = _driver()
        flags = int(driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ)
        stream = torch.cuda.current_stream(self._device)
        with _context(self._device):
            queued = driver.cuStreamWaitValue64(
                driver.CUstream(stream.cuda_stream), bell.data_ptr(), value, flags
            )
        _check("cuStreamWaitValue64", *queued)

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
        driver = _driver()
        flags = int(driver.CUstreamWriteValue_flags.CU_STREAM_WRITE_VALUE_DEFAULT)
        with _context(self._device):
            queued = driver.cuStreamWriteValue64(
                driver.CUstream(stream.cuda_stream), bell.data_ptr(), value, flags
            )
        _check("cuStreamWriteValue64", *queued)


class _Described:
    """Memory as torch takes it over: the CUDA array interface, version 3."""

    def __init__(self, pointer: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (pointer, False),
            "strides": None,
            "version": 3,
        }


@contextlib.contextmanager
def _context(device: torch.device) -> Iterator[None]:
    """The driver's calls find the device's context on this thread, whichever thread it is."""
    with torch.cuda.device(device):
        torch.cuda.current_stream().query()  # the runtime's first call on a thread binds it
        yield


def _tensor(pointer: int, size: int, device: torch.device) -> Tensor:
    return torch.as_tensor(_Described(pointer, size), device=device)


def _driver() -> Any:
    with contextlib.suppress(ImportError):
        from cuda.bindings import driver

        return driver
    raise CudaIpcError("the package cuda-bindings is not installed")


def _check(what: str, error: Any, *values: Any) -> Any:
    if int(error) != 0:
        raise CudaIpcError(f"{what}: {error!r}")
    return values[0] if values else None
