"""The CUDA driver's own functions, for what torch has no call for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from outrider.shared.core.errors import OutriderError


class CudaDriverError(OutriderError):
    """A call of the CUDA driver failed or can't be made; the message says which and why."""

    status = "FAILED_PRECONDITION"


def bindings() -> Any:
    """The module ``cuda.bindings.driver``. Raises ``CudaDriverError`` where it is not installed."""
    with contextlib.suppress(ImportError):
        from cuda.bindings import driver

        return driver
    raise CudaDriverError("the package cuda-bindings is not installed")


def check(what: str, error: Any, *values: Any) -> Any:
    """The first of ``values``; raises ``CudaDriverError`` where ``error`` is one of ``what``."""
    if int(error) != 0:
        raise CudaDriverError(f"{what}: {error!r}")
    return values[0] if values else None


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """The driver's calls find the device's context on this thread, whichever thread it is."""
    with torch.cuda.device(device):
        torch.cuda.current_stream().query()  # the runtime's first call on a thread binds it
        yield
