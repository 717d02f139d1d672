"""The threads that run a forward together: those of torch's own OpenMP library.

A second pool beside torch's would have its threads spin while torch's work, and the other way.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

_NAMES = ("libgomp.so.1", "libomp.dylib", "libiomp5.so", "libiomp5.dylib")
_NEEDED = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


@cache
def openmp() -> Any:
    """The library with the entry that compilers call; None where torch brings none."""
    import torch

    for name in _NAMES:
        found = Path(torch.__file__).parent / "lib" / name
        if not found.exists():
            continue
        library = ctypes.CDLL(str(found))
        if all(hasattr(library, symbol) for symbol in _NEEDED):
            library.GOMP_parallel.argtypes = [
                ctypes.c_void_p,
                ctypes.c_void_p,
                ctypes.c_uint,
                ctypes.c_uint,
            ]
            return library
    return None


def address(function: Any) -> int:
    """Where a C function begins."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0
