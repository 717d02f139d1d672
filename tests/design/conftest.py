"""Runs SPIN on a model of ``docs/design``.

Needs ``spin`` and ``gcc`` (Debian: both are packages of those names; gcc compiles the checker
that spin writes).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

MODELS = Path(__file__).parents[2] / "docs" / "design"
MEMORY_MIB = 1900


@dataclass(frozen=True)
class Report:
    """What the checker said."""

    errors: int
    complete: bool
    states: int
    violation: str
    unreached: tuple[str, ...]


class Check(Protocol):
    """See ``check``."""

    def __call__(self, *defines: str, liveness: bool = True, optimise: str = "-O1") -> Report: ...


@pytest.fixture
def check(request: pytest.FixtureRequest, tmp_path: Path) -> Check:
    """Searches the whole state space of the test module's ``MODEL``; stops at the first violation.

    With ``liveness`` the model's claim is checked too, in every interleaving (without assuming
    fairness); a deadlock breaks it as well. Without, assertions and deadlocks are checked, at
    half the cost.
    """
    missing = [tool for tool in ("spin", "gcc") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)} on the path (apt-get install spin gcc)")
    model = MODELS / request.module.MODEL

    def run(*defines: str, liveness: bool = True, optimise: str = "-O1") -> Report:
        _run(tmp_path, "spin", "-a", *(f"-D{name}" for name in defines), str(model))
        mode = ["-DNOFAIR"] if liveness else ["-DSAFETY", "-DNOCLAIM"]
        _run(tmp_path, "gcc", optimise, "-w", "-DCOLLAPSE", f"-DMEMLIM={MEMORY_MIB}", *mode,
             "-o", "pan", "pan.c")  # fmt: skip
        output = _run(tmp_path, "./pan", "-m20000", *(["-a"] if liveness else []))
        errors = re.search(r"errors: (\d+)", output)
        states = re.search(r"(\d+) states, stored", output)
        violation = re.search(r"pan:1: (.*)", output)
        assert errors and states, output
        return Report(
            errors=int(errors[1]),
            complete="Search not completed" not in output and "max search depth" not in output,
            states=int(states[1]),
            violation=violation[1] if violation else "",
            unreached=tuple(re.findall(r'state \d+, "(.*)"', output)),
        )

    return run


def _run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=250)
    # SPIN's own tools report on stdout and end with 0 also where they object.
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout
