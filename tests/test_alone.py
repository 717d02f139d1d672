"""Of the tests that run at once, those that want the machine for themselves have it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from outrider_testing import alone
from outrider_testing.waiting import soon

TESTS = """
import os
import pathlib
import time

import pytest

HERE = pathlib.Path(__file__).parent


def met(name, other):
    (HERE / name).touch()
    while not (HERE / other).exists():
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def guests():
    mine = HERE / f"inside-{os.getpid()}"
    mine.touch()
    yield lambda: len(list(HERE.glob("inside-*")))
    mine.unlink()


@pytest.mark.serial
@pytest.mark.parametrize("number", range(4))
def test_one(number, guests):
    for _ in range(20):
        assert guests() == 1
        time.sleep(0.005)


# Each worker is given the next two tests at first.
@pytest.mark.parametrize(
    ("mine", "other"), [("left", "right"), ("left", "left"), ("right", "left"), ("left", "left")]
)
def test_many(mine, other):
    met(mine, other)


def test_the_limit_begins_inside(pytestconfig):
    # The hook that is called first is the last of these.
    hooks = [one.plugin_name for one in pytestconfig.hook.pytest_runtest_protocol.get_hookimpls()]
    assert hooks.index("outrider_worker") > hooks.index("timeout")
"""


def test_alone_workers_run_serial_tests_one_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nmarkers = serial: alone\nasyncio_default_fixture_loop_scope = function\n"
    )
    support = str(Path(alone.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n2", "--dist=load", "--maxschedchunk=1", "-p",
         "outrider_testing.alone", "-p", "no:cacheprovider", "--timeout=100", "-q", str(tmp_path)],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        | {"PYTHONPATH": support},
        capture_output=True,
        text=True,
        timeout=200,
    )  # fmt: skip
    assert done.returncode == 0 and "9 passed" in done.stdout, done.stdout + done.stderr


def test_alone_what_is_slow_is_first_and_what_is_serial_last() -> None:
    def item(path: str, *marks: str) -> Any:
        return SimpleNamespace(path=path, get_closest_marker=lambda name: name in marks)

    serial, gpu = item("a", "serial"), item("b", "gpu", "slow")
    plain, slow, beside_it = item("a"), item("b", "slow"), item("b")
    items = [serial, plain, gpu, slow, beside_it]
    alone.pytest_collection_modifyitems(items)
    assert items == [slow, beside_it, plain, gpu, serial]


def test_alone_who_waits_for_an_empty_room_is_not_passed_by(tmp_path: Path) -> None:
    room = alone.Room(tmp_path)
    order: list[str] = []
    standing = threading.Event()

    def enter(name: str, *, serial: bool) -> None:
        with room.entered(alone=serial):
            order.append(name)
            if serial:
                standing.wait(60)
            order.append(name)

    def somebody_in_the_door() -> bool:
        with room.door.open("w") as door:
            try:
                fcntl.flock(door, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    serial = threading.Thread(target=enter, args=("serial",), kwargs={"serial": True})
    late = threading.Thread(target=enter, args=("late",), kwargs={"serial": False})
    with room.entered(alone=False), room.entered(alone=False):
        serial.start()
        soon(somebody_in_the_door)
        late.start()
        assert order == []
    soon(lambda: order)
    standing.set()
    serial.join()
    late.join()
    assert order == ["serial", "serial", "late", "late"]
