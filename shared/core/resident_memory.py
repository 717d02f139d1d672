"""What this process holds in memory."""

from __future__ import annotations

from pathlib import Path


def resident_bytes() -> int:
    """Resident memory of this process; its peak where the system tells only that."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    import mmap

    return pages * mmap.PAGESIZE
