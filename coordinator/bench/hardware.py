"""What the figures were measured on: machine and versions."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from outrider.shared.core.host import cores

_PACKAGES = ("outrider", "torch", "transformers", "grpcio", "protobuf", "triton", "numpy")


def provenance() -> dict[str, object]:
    """What every file of figures says: the machine, and the command that was given."""
    return {"hardware": describe(), "command": " ".join(["outrider", *sys.argv[1:]])}


def describe() -> dict[str, object]:
    """Processor, cores, accelerators, operating system and versions of what matters."""
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "accelerators": accelerators(),
        "cores": cores(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: v for name in _PACKAGES if (v := _version(name))},
    }


def accelerators() -> list[str]:
    """Names and drivers of NVIDIA's GPUs here; none where their driver says nothing."""
    # Asked of the driver's own program: torch may not be loaded here, and takes seconds to.
    if (program := shutil.which("nvidia-smi")) is None:
        return []
    asked = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [", driver ".join(line.split(", ")) for line in found.splitlines()]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
