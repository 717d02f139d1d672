"""Fixtures for all tests: a tiny random pair on disk, and processes that surely end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from outrider.shared.link import doorbell
from outrider_testing.checkpoints import write_llama

pytest_plugins = ["outrider_testing.alone"]
# No deadline, since the cores are shared by workers; the same examples each time.
settings.register_profile("outrider", deadline=None, derandomize=True)
settings.load_profile("outrider")
# Before torch is imported, here and in what tests start: the cores are shared by workers and
# services, and threads that wait for each other on a busy core take many times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Kernels are compiled once for all workers and runs, and not into the user's own folder.
os.environ["XDG_CACHE_HOME"] = f"{tempfile.gettempdir()}/outrider-tests-{os.getuid()}"
# Nor does each service that a test starts time its rounds first; whoever tests that asks for it.
UNTIMED = {"OUTRIDER_BASE_CALIBRATE": "false", "OUTRIDER_DRAFT_CALIBRATE": "false"}
os.environ.update(UNTIMED)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random base: two layers, grouped queries, 320 tokens."""
    return write_llama(tmp_path_factory.mktemp("tiny") / "base", layers=2, hidden=64, seed=1)


@pytest.fixture(scope="session")
def tiny_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random draft with the same tokenizer."""
    return write_llama(tmp_path_factory.mktemp("tiny") / "draft", layers=1, hidden=32, seed=2)


@pytest.fixture(autouse=True)
def nobody_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may hold a thread up for longer than the product waits for its beat."""
    monkeypatch.setattr(doorbell, "STALE_SECONDS", 60.0)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A private folder whose path is short enough for unix sockets."""
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="or-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts ``python -P -m MODULE ARGS…`` and kills what the test left of it."""
    running: list[subprocess.Popen[str]] = []

    def start(module: str, *args: str, env: dict[str, str] | None = None, **options: Any) -> Any:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("OUTRIDER_")}
        clean |= {"OMP_NUM_THREADS": "1"} | UNTIMED | (env or {})
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *args],
            env=clean,
            text=True,
            start_new_session=True,
            **options,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
