"""The numbers that a step needs, in fixed buffers: one on the host, pinned, and its twin on the
device, so that one copy carries everything and a captured graph finds it where it was."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_TYPES = {
    "i": (np.int32, torch.int32),
    "f": (np.float32, torch.float32),
    "l": (np.int64, torch.int64),
}


@dataclass(frozen=True, slots=True)
class Field:
    """One array of the buffer: ``kind`` is i (int32), f (float32) or l (int64)."""

    name: str
    shape: tuple[int, ...]
    kind: str = "i"


class Inputs:
    """Arrays with a host side (``host[name]``, numpy) and a device side (``device[name]``)."""

    def __init__(self, fields: list[Field], device: torch.device) -> None:
        places, size = {}, 0
        for field in fields:
            size = -(-size // 16) * 16
            places[field.name] = size
            size += math.prod(field.shape) * (8 if field.kind == "l" else 4)
        pin = device.type == "cuda"
        self.host_bytes = torch.zeros(size, dtype=torch.uint8, pin_memory=pin)
        self.device_bytes = torch.zeros(size, dtype=torch.uint8, device=device)
        self.host: dict[str, NDArray[np.generic]] = {}
        self.device: dict[str, Tensor] = {}
        for field in fields:
            own, torch_type = _TYPES[field.kind]
            begin = places[field.name]
            count = math.prod(field.shape) * np.dtype(own).itemsize
            view = self.host_bytes.numpy()[begin : begin + count].view(own)
            self.host[field.name] = view.reshape(field.shape)
            part = self.device_bytes[begin : begin + count].view(torch_type)
            self.device[field.name] = part.view(field.shape)

    def upload(self) -> None:
        """Copies the host's side to the device, in stream order."""
        self.device_bytes.copy_(self.host_bytes, non_blocking=True)
