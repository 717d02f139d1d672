"""What an operation is: a reference, a maker of inputs, a tolerance, implementations best first.

Every implementation is a function of the same keyword arguments that writes into the tensors it
is given. ``registry`` lists the operations and chooses among their implementations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from outrider.kernels.cuda import Compiler, available

Call = Callable[..., None]
Arguments = dict[str, Any]


class Tools:
    """What implementations are built with, for one device."""

    def __init__(self, device: torch.device, compiler: Any = None) -> None:
        """``compiler``: instead of the device's own (tests)."""
        self.device = device
        self._given = compiler

    @cached_property
    def compiler(self) -> Any:
        """Compiles and keeps the CUDA sources."""
        return self._given if self._given is not None else Compiler(self.device)

    @cached_property
    def processors(self) -> int:
        """Multiprocessors of the device."""
        if self.device.type != "cuda":
            return 4
        return torch.cuda.get_device_properties(self.device).multi_processor_count


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to run an operation.

    ``why_not``: the reason it can't run on (device, dtype), or None. ``build``: makes the
    function; may compile. ``cost``: what it costs against the best one, in words.
    """

    name: str
    why_not: Callable[[torch.device, torch.dtype], str | None]
    build: Callable[[Tools], Call]
    cost: str = ""


@dataclass(frozen=True, slots=True)
class Operation:
    """``outputs``: the arguments that are written. ``cases``: inputs for a device and a type.

    ``tolerance``: largest ‖out − reference‖ / ‖reference‖ by type; for integers exact equality.
    """

    name: str
    summary: str
    reference: Call
    outputs: tuple[str, ...]
    cases: Callable[[torch.device, torch.dtype], Iterator[Arguments]]
    tolerance: Mapping[torch.dtype, float]
    implementations: Sequence[Implementation]


def no_cuda_source(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the CUDA C++ sources can't run on (device, dtype); None where they can."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{word(dtype)} is not a tensor-core type"
    major, minor = torch.cuda.get_device_capability(device)
    if major * 10 + minor < 75:
        return f"compute capability {major}.{minor} is older than 7.5"
    if dtype == torch.bfloat16 and major < 8:
        return f"compute capability {major}.{minor} has no bfloat16"
    return available()


def no_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton can't run on (device, dtype); None where it can."""
    try:
        import triton
    except ImportError:
        return "the package triton is missing"
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        return "the device is cpu (and Triton's interpreter is off)"
    if device.type not in ("cpu", "cuda"):
        return f"the device is {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "Triton has no tensor-core product for this chip"
    return None


def always(device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs everywhere."""
    return None


def word(dtype: torch.dtype) -> str:
    """The type's name as users write it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
