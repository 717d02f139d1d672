"""The built wheel holds everything and runs outside the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_wheel_generates_outside_the_checkout(tmp_path: Path) -> None:
    # From a copy: setuptools writes its build folder into the source tree.
    source = tmp_path / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    subprocess.run(
        [*pip, "wheel", "--no-deps", "-w", str(wheels), str(source)], check=True, timeout=200
    )
    (wheel,) = wheels.glob("outrider-*.whl")
    assert wheel.stat().st_size < 35 << 20
    with zipfile.ZipFile(wheel) as packed:  # which is all that installing it does
        packed.extractall(site)
    for name in (
        "protos/generation.proto",
        "protos/py.typed",
        "shared/pair/base/model.safetensors",
        "shared/pair/draft/tokenizer.json",
    ):
        assert (site / "outrider" / name).is_file(), name

    # -P and an empty folder: nothing of the checkout is on the path, the wheel comes first.
    env = {k: v for k, v in os.environ.items() if not k.startswith("OUTRIDER_")}
    env["PYTHONPATH"] = str(site)
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    where = subprocess.run(
        [sys.executable, "-P", "-c", "import outrider.shared as s; print(s.__file__)"],
        cwd=outside,
        env=env,
        check=True,
        capture_output=True,
        text=True,
    )
    assert where.stdout.startswith(str(site))
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-P",
                "-m",
                "outrider.coordinator.cli.main",
                "generate",
                "def add(a, b):",
            ),
            *("--max-new-tokens", "8", "--json"),
        ],
        cwd=outside,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 8
