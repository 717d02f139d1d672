"""``outrider doctor``: versions, devices, and what is missing."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from typing import Any

from outrider.coordinator.local import cuda_mps
from outrider.shared.model import kernel_choices

PACKAGES = (
    "outrider",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "llvmlite",
    "grpcio",
    "protobuf",
    "triton",
    "kernels",
)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit status, 1 when something needed is missing."""
    report = examine()
    if args.json:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            if isinstance(value, dict):
                print(f"{name}:")
                for key, one in value.items():
                    print(f"  {key:<14} {one}")
            else:
                print(f"{name}: {value}")
    return 1 if report["problems"] else 0


def examine() -> dict[str, Any]:
    """What the command shows; imports torch to ask for devices."""
    problems: list[str] = []
    packages: dict[str, str] = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = "not installed"
            if name not in ("triton", "kernels"):
                problems.append(f"{name} is not installed")
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": packages,
        "devices": _devices(problems),
        "cuda-mps": cuda_mps.state(),
        "operations": kernel_choices.chosen(),
        "pair": _pair(problems),
        "problems": problems,
    }


def _devices(problems: list[str]) -> dict[str, str]:
    try:
        import torch
    except ImportError as error:
        problems.append(f"torch can't be imported: {error}")
        return {}
    found = {"cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        its = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = (
            f"{its.name}, sm_{its.major}{its.minor}, {its.total_memory / 2**30:.1f} GiB"
        )
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    return found


def _pair(problems: list[str]) -> dict[str, str]:
    from outrider.shared import pair

    found = {}
    for name in pair.NAMES:
        try:
            found[name] = str(pair.path(name))
        except FileNotFoundError as error:
            problems.append(str(error))
            found[name] = "missing"
    return found
