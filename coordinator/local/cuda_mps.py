"""NVIDIA's Multi-Process Service for our own processes.

Two processes that take turns on one GPU lose about 150 µs at each turn to switching contexts
(measured on one H200); under the MPS control daemon they lose next to nothing. This starts one
with pipe and log folders of its own and the user's rights, so it neither finds nor disturbs
another. (Always written ``cuda-mps``: ``mps`` alone is Apple's backend.)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from outrider.coordinator.local.private_stack import short_folder
from outrider.shared.core.errors import ConfigError

CONTROL = "nvidia-cuda-mps-control"
START_SECONDS, STOP_SECONDS = 20.0, 20.0
_SYSTEM_PIPES = "/tmp/nvidia-mps"


@contextlib.contextmanager
def daemon(wanted: bool = True) -> Iterator[dict[str, str]]:
    """Runs the daemon for the block; yields the environment in which processes use it.

    A keeper process ends it also when this one is killed. Raises ``ConfigError`` where the
    daemon can't be had. Without ``wanted`` nothing is started.
    """
    if not wanted:
        yield {}
        return
    if shutil.which(CONTROL) is None:
        raise ConfigError(
            f"--cuda-mps: {CONTROL} is not on PATH; it comes with NVIDIA's driver on Linux"
        )
    # Sockets are made in it, whose paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="outrider-mps-", dir=short_folder()))
    environment = {
        "CUDA_MPS_PIPE_DIRECTORY": str(folder / "pipe"),
        "CUDA_MPS_LOG_DIRECTORY": str(folder / "log"),
    }
    keeper: subprocess.Popen[str] | None = None
    try:
        for path in environment.values():
            Path(path).mkdir()
        _start(environment)
        keeper = subprocess.Popen(
            [sys.executable, "-P", "-m", "outrider.coordinator.local.cuda_mps", str(folder)],
            stdin=subprocess.PIPE,
            env=os.environ | environment,
            text=True,
            start_new_session=True,  # a Ctrl-C is not for it
        )
        yield environment
    finally:
        if keeper is not None and keeper.stdin is not None:
            keeper.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                keeper.wait(STOP_SECONDS)
        shutil.rmtree(folder, ignore_errors=True)


def state(environment: Mapping[str, str] | None = None) -> str:
    """For a person: whether the daemon is to be had and on, and what it saves."""
    env = os.environ if environment is None else environment
    pipes = Path(env.get("CUDA_MPS_PIPE_DIRECTORY", _SYSTEM_PIPES))
    if (pipes / "control").exists():
        return f"on, at {pipes}"
    if shutil.which(CONTROL) is None:
        return f"not to be had: {CONTROL} is not on PATH"
    return (
        "off; `outrider up --cuda-mps` runs it for its own processes and saves about 150 µs a "
        "turn where draft and base share a GPU (measured on one H200)"
    )


def _start(environment: Mapping[str, str]) -> None:
    try:
        done = subprocess.run(
            [CONTROL, "-d"],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"--cuda-mps: {CONTROL} -d took over {START_SECONDS:g} s") from None
    if done.returncode:
        said = (done.stdout + done.stderr).strip()
        raise ConfigError(f"--cuda-mps: {CONTROL} -d ended with {done.returncode}: {said}")


def _keep(folder: Path) -> int:
    """Waits until whoever started us is done or gone, then ends the daemon."""
    sys.stdin.read()
    try:
        done = subprocess.run(
            [CONTROL],
            input="quit -t 5\n",
            capture_output=True,
            text=True,
            timeout=STOP_SECONDS,
            check=False,
        )
        return done.returncode
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(_keep(Path(sys.argv[1])))
