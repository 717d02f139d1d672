"""The examples, run the way their first lines say."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_python_example_streams(bundled_target: str) -> None:
    done = subprocess.run(
        [sys.executable, "stream.py", bundled_target, "def fibonacci(n):"],
        cwd=ROOT / "examples" / "python",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "[64 tokens in " in done.stdout


def test_python_example_reports_a_bad_prompt(bundled_target: str) -> None:
    done = subprocess.run(
        [sys.executable, "stream.py", bundled_target, ""],
        cwd=ROOT / "examples" / "python",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("INVALID_ARGUMENT: prompt")


@pytest.mark.skipif(shutil.which("npm") is None, reason="Node.js with npm is not installed")
@pytest.mark.timeout(300)
def test_node_example_streams(bundled_target: str, tmp_path: Path) -> None:
    # A copy, so that node_modules does not appear in the checkout.
    for part in ("examples/node", "protos"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("node_modules"))
    folder = tmp_path / "examples" / "node"
    subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund"],
        cwd=folder,
        check=True,
        capture_output=True,
        timeout=200,
    )
    done = subprocess.run(
        ["node", "stream.mjs", bundled_target, "def fibonacci(n):"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "[64 tokens in " in done.stdout
    assert "FINISH_REASON_MAX_TOKENS" in done.stdout
