"""Starting and ending CUDA MPS. The daemon itself needs a GPU: a stand-in notes what is asked."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from outrider.coordinator.local import cuda_mps
from outrider.shared.core.errors import ConfigError
from outrider_testing.waiting import soon

STAND_IN = """#!/bin/sh
if [ "$1" = "-d" ]; then
  echo "start $CUDA_MPS_PIPE_DIRECTORY" >> {log}
  touch "$CUDA_MPS_PIPE_DIRECTORY/control"
  exit {status}
fi
read words
rm -f "$CUDA_MPS_PIPE_DIRECTORY/control"
echo "$words" >> {log}
"""


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in on PATH; the path of what it notes."""
    return _install(tmp_path, monkeypatch, 0)


def _install(folder: Path, monkeypatch: pytest.MonkeyPatch, status: int) -> Path:
    log = folder / "asked"
    program = folder / cuda_mps.CONTROL
    program.write_text(STAND_IN.format(log=log, status=status))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return log


def test_daemon_runs_in_folders_of_its_own_and_is_ended(control: Path) -> None:
    with cuda_mps.daemon() as environment:
        pipes = Path(environment["CUDA_MPS_PIPE_DIRECTORY"])
        assert pipes.is_dir() and Path(environment["CUDA_MPS_LOG_DIRECTORY"]).is_dir()
        assert cuda_mps.state(environment) == f"on, at {pipes}"
        assert control.read_text() == f"start {pipes}\n"
    assert control.read_text().splitlines()[1:] == ["quit -t 5"]
    assert not pipes.parent.exists()


def test_daemon_is_not_started_unasked(control: Path) -> None:
    with cuda_mps.daemon(False) as environment:
        assert environment == {}
    assert not control.exists()


def test_daemon_ends_with_a_killed_supervisor(control: Path) -> None:
    program = (
        "import time\nfrom outrider.coordinator.local import cuda_mps\n"
        "with cuda_mps.daemon() as e:\n    print(e['CUDA_MPS_PIPE_DIRECTORY'], flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", program], stdout=subprocess.PIPE, text=True
    ) as supervisor:
        assert supervisor.stdout is not None
        folder = Path(supervisor.stdout.readline().strip()).parent
        supervisor.send_signal(signal.SIGKILL)
    soon(lambda: not folder.exists())
    assert control.read_text().splitlines()[1:] == ["quit -t 5"]


def test_daemon_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path, monkeypatch, 3)
    with pytest.raises(ConfigError, match="-d ended with 3"), cuda_mps.daemon():
        pass


def test_daemon_that_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="is not on PATH"), cuda_mps.daemon():
        pass
    assert "not to be had" in cuda_mps.state({"CUDA_MPS_PIPE_DIRECTORY": "/nonexistent"})


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which(cuda_mps.CONTROL) is None, reason="no CUDA MPS here")
def test_daemon_serves_a_process_on_the_gpu() -> None:
    with cuda_mps.daemon() as environment:
        done = subprocess.run(
            [sys.executable, "-c", "import torch; print(torch.ones(3, device='cuda').sum())"],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert "3." in done.stdout
        log = Path(environment["CUDA_MPS_LOG_DIRECTORY"]) / "control.log"
        assert "NEW CLIENT" in log.read_text()
