"""Operations, each declared once, and the choice of the implementation that runs.

An operation has a reference in PyTorch, a maker of inputs, a tolerance, and implementations,
best first. ``resolve`` takes the best that works on a device for a type; ``choices`` reports
what was taken, why the better ones were not, and what that costs. Every implementation is a
function of the same keyword arguments that writes into the tensors it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from outrider.kernels.cuda import Compiler
from outrider.kernels.cuda import available as cuda_available

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


@dataclass(frozen=True, slots=True)
class Choice:
    """What was taken for an operation; ``skipped``: (better implementation, why not)."""

    operation: str
    implementation: str
    skipped: tuple[tuple[str, str], ...]
    cost: str

    def __str__(self) -> str:
        """One line for logs and ``outrider doctor``."""
        line = f"{self.operation}: {self.implementation}"
        for name, reason in self.skipped:
            line += f"; not {name}: {reason}"
        return f"{line}; cost: {self.cost}" if self.skipped and self.cost else line


class NotAvailable(LookupError):
    """An operation or implementation that is not there; the message lists what is."""


def no_cuda_source(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the CUDA C++ sources can't run on (device, dtype); None where they can."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{_word(dtype)} is not a tensor-core type"
    major, minor = torch.cuda.get_device_capability(device)
    if major * 10 + minor < 75:
        return f"compute capability {major}.{minor} is older than 7.5"
    if dtype == torch.bfloat16 and major < 8:
        return f"compute capability {major}.{minor} has no bfloat16"
    return cuda_available()


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


def operations() -> dict[str, Operation]:
    """Every operation by name."""
    from outrider.kernels import (
        accept,
        attention,
        choose,
        embed,
        follow,
        linear,
        norm,
        reject,
        settle,
        take,
    )

    modules = (embed, norm, linear, attention, choose, accept, reject, take, settle, follow)
    return {module.OPERATION.name: module.OPERATION for module in modules}


def resolve(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    implementation: str | None = None,
) -> tuple[Implementation, Choice]:
    """The best implementation of ``name`` for (device, dtype), or the one asked for.

    Raises NotAvailable where the operation, or the implementation asked for, is not there.
    """
    known = operations()
    if name not in known:
        raise NotAvailable(f"no operation {name!r}; there are {', '.join(known)}")
    operation = known[name]
    skipped: list[tuple[str, str]] = []
    for candidate in operation.implementations:
        if implementation is not None and candidate.name != implementation:
            continue
        reason = candidate.why_not(device, dtype)
        if reason is None:
            return candidate, Choice(name, candidate.name, tuple(skipped), candidate.cost)
        skipped.append((candidate.name, reason))
    works = [c.name for c in operation.implementations if c.why_not(device, dtype) is None]
    reasons = "; ".join(f"{n}: {r}" for n, r in skipped)
    raise NotAvailable(
        f"{name}: no implementation {implementation!r} for {_word(dtype)} on {device}"
        f"{f' ({reasons})' if reasons else ''}; there are {', '.join(works)}"
    )


def choices(device: torch.device, dtype: torch.dtype) -> list[Choice]:
    """What ``resolve`` takes for every operation."""
    return [resolve(name, device, dtype)[1] for name in operations()]


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
