"""Device memory that two processes share.

Raw 64-byte handles of CUDA's inter-process communication; nothing is pickled.

Source: CUDA driver API, section "IPC" (6.14).
"""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.shared.link.device.driver import CudaDriverError, bindings, check, on_device

HANDLE_BYTES = 64


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
        driver = bindings()
        torch.cuda.synchronize(self.tensor.device)
        self.tensor = None
        if self.handle:
            check("cuMemFree", *driver.cuMemFree(self.pointer))
        else:
            check("cuIpcCloseMemHandle", *driver.cuIpcCloseMemHandle(self.pointer))


def why_not(device: torch.device) -> str | None:
    """Why device memory can't be shared there; None where it can."""
    if device.type != "cuda":
        return f"the model runs on {device.type}"
    try:
        driver = bindings()
        with on_device(device):
            own = check("cuCtxGetDevice", *driver.cuCtxGetDevice())
            asked = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS
            able = check("cuDeviceGetAttribute", *driver.cuDeviceGetAttribute(asked, own))
    except CudaDriverError as error:
        return str(error)
    return None if able else "the device has no 64-bit stream memory operations"


def device_uuid(device: torch.device) -> str:
    """The device's own identity, the same in every process, whatever number it has there."""
    return str(torch.cuda.get_device_properties(device).uuid)


def allocate(size: int, device: torch.device) -> SharedMemory:
    """Memory that another process may open. Raises ``CudaDriverError``."""
    driver = bindings()
    with on_device(device):
        # An allocation of its own: a handle of torch's pool would give all of the pool away.
        pointer = int(check("cuMemAlloc", *driver.cuMemAlloc(size)))
        try:
            handle = check("cuIpcGetMemHandle", *driver.cuIpcGetMemHandle(pointer))
        except CudaDriverError:
            driver.cuMemFree(pointer)
            raise
        raw = ctypes.string_at(handle.getPtr(), HANDLE_BYTES)
        return SharedMemory(_tensor(pointer, size, device), raw, pointer)


def open_handle(raw: bytes, size: int, device: torch.device) -> SharedMemory:
    """Another process's memory. Raises ``CudaDriverError``."""
    if len(raw) != HANDLE_BYTES:
        raise CudaDriverError(f"a handle of {len(raw)} bytes; it must have {HANDLE_BYTES}")
    driver = bindings()
    handle = driver.CUipcMemHandle()
    ctypes.memmove(handle.getPtr(), raw, HANDLE_BYTES)
    with on_device(device):
        flags = int(driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS)
        opened = driver.cuIpcOpenMemHandle(handle, flags)
        pointer = int(check("cuIpcOpenMemHandle", *opened))
        return SharedMemory(_tensor(pointer, size, device), b"", pointer)


def complete(device: torch.device) -> None:
    """Waits until all that was queued is done: then another process can see what it wrote."""
    torch.cuda.current_stream(device).synchronize()


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


def _tensor(pointer: int, size: int, device: torch.device) -> Tensor:
    return torch.as_tensor(_Described(pointer, size), device=device)
