"""What is told of the machine that figures come from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from outrider.coordinator.bench import hardware


@pytest.mark.parametrize(
    ("says", "status", "expected"),
    [
        ("NVIDIA H200, 580.159.04", 0, ["NVIDIA H200, driver 580.159.04"]),
        ("Tesla T4, 550.1\nTesla T4, 550.1", 0, ["Tesla T4, driver 550.1"] * 2),
        ("No devices were found", 6, []),
    ],
)
def test_accelerators_are_those_that_the_driver_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, status: int, expected: list[str]
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '%s\\n' '{says}'\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert hardware.accelerators() == expected
    assert hardware.describe()["accelerators"] == expected


def test_accelerators_without_a_driver_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert hardware.accelerators() == []
