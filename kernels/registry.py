"""The operations, each declared in a file of its own, and the choice of what runs.

``resolve`` takes the best implementation that works on a device for a type; ``choices`` reports
what was taken, why the better ones were not, and what that costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
from outrider.kernels.operation import Implementation, Operation, word

MODULES = (embed, norm, linear, attention, choose, accept, reject, take, settle, follow)


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


def operations() -> dict[str, Operation]:
    """Every operation by name."""
    return {module.OPERATION.name: module.OPERATION for module in MODULES}


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
        f"{name}: no implementation {implementation!r} for {word(dtype)} on {device}"
        f"{f' ({reasons})' if reasons else ''}; there are {', '.join(works)}"
    )


def choices(device: torch.device, dtype: torch.dtype) -> list[Choice]:
    """What ``resolve`` takes for every operation."""
    return [resolve(name, device, dtype)[1] for name in operations()]
