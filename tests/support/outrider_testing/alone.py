"""A pytest plugin: a test marked ``serial`` or ``gpu`` runs while no other test does.

pytest-xdist gives its workers whatever is left, and knows no test that wants the machine for
itself. Here each test holds a lock while it runs, one that all workers share: an ordinary test
together with others, a serial one alone. To wait for it is no part of a test; neither its
fixtures nor its time limit have begun. What is slow comes first, so that no worker is left with
a long test when the others have ended, and what is serial comes last, when nothing else is left.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ALONE = ("serial", "gpu")
_FOLDER = "outrider_room"
"""What the folder is called where xdist's controller tells its workers of it."""


class Room:
    """Holds many ordinary tests, or a single serial one."""

    def __init__(self, folder: Path) -> None:
        """``folder``: exists, and is the same for all workers of a run."""
        self.room, self.door = folder / "room", folder / "door"

    @contextmanager
    def entered(self, *, alone: bool) -> Iterator[None]:
        """Waits for its turn; leaves at the end of the block, or with the process."""
        with self.room.open("w") as room:
            # Who waits for the room to be empty stands in the door, so that nobody passes by.
            with self.door.open("w") as door:
                fcntl.flock(door, fcntl.LOCK_EX)
                fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            yield


class Worker:
    """Has each test of one worker enter the room."""

    def __init__(self, room: Room) -> None:
        self._room = room

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        with self._room.entered(alone=_alone(item)):
            return (yield)


class Controller:
    """Tells the workers where the room is."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="outrider-tests-")

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput[_FOLDER] = self._folder

    def pytest_unconfigure(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def pytest_configure(config: pytest.Config) -> None:
    """Without workers there is nobody to wait for."""
    told = getattr(config, "workerinput", None)
    if told is not None:
        config.pluginmanager.register(Worker(Room(Path(told[_FOLDER]))), "outrider_worker")
    elif config.getoption("tx", None):
        config.pluginmanager.register(Controller())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole files, so that what a file has set up is of use to all its tests."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (_alone(item), item.path not in slow))


def _alone(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in ALONE)
