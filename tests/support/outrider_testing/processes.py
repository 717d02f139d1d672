"""What a process holds, by the kernel's word: for tests that look for leaks. Linux only."""

from __future__ import annotations

import contextlib
import gc
import json
import mmap
import multiprocessing
import os
import sys
import threading
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from outrider.shared.link.mailbox import Mailbox, layout_of

MEMORY = "memfd:outrider-mailbox"
LISTENS = 0x10000
"""Flag of a listening socket in /proc/net/unix."""


def descriptors(pid: int) -> list[str]:
    """What the open descriptors of a process stand for, such as ``socket:[123]``."""
    made = []
    for one in Path(f"/proc/{pid}/fd").iterdir():
        try:
            made.append(str(one.readlink()))
        except FileNotFoundError:
            continue  # closed since the folder was read
    return made


def held() -> set[object]:
    """What this process holds: its threads, descriptors, and mappings of mailboxes.

    Each stands for itself, since counts mislead: what earlier tests left to the collector, or to a
    thread that ends by itself, may go at any moment. ``held() - before`` is what is new.
    """
    gc.collect()
    found: set[object] = set(threading.enumerate())
    for one in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since the folder was read
            target = str(one.readlink())
            if not target.startswith("/proc/"):  # this very look
                found.add((one.name, target))
    maps = Path("/proc/self/maps").read_text().splitlines()
    found.update(line for line in maps if "outrider-mailbox" in line)
    return found


def mapped(pid: int) -> list[str]:
    """Lines of the process's memory map that have a file or a name."""
    text = Path(f"/proc/{pid}/maps").read_text()
    return [line for line in text.splitlines() if len(line.split()) > 5]


def threads(pid: int) -> int:
    """How many threads it has."""
    return sum(1 for _ in Path(f"/proc/{pid}/task").iterdir())


def resident(pid: int) -> int:
    """Its resident memory in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def mailboxes(pid: int) -> tuple[int, int]:
    """Memories of mailboxes that it has mapped, and descriptors of such."""
    inodes = {line.split()[4] for line in mapped(pid) if MEMORY in line}
    return len(inodes), sum(MEMORY in one for one in descriptors(pid))


def abstract_names(pid: int | None = None) -> set[str]:
    """Names of sockets at which mailboxes were handed over; of all processes without ``pid``."""
    found = (_unix_sockets() if pid is None else _own(pid)).values()
    return {path for _, path in found if path.startswith("@outrider-")}


def doorbells(pid: int) -> set[int]:
    """Inodes of the process's doorbells: connections without a file, but for its pipes."""
    return {inode for inode, (listens, path) in _own(pid).items() if not listens and _bell(path)}


def offers(pid: int) -> set[str]:
    """Names of sockets at which it offers mailboxes."""
    return {path for listens, path in _own(pid).values() if listens and _bell(path)}


def mailbox(pid: int) -> Mailbox:
    """The one mailbox that it holds; to be looked at only."""
    for one in Path(f"/proc/{pid}/fd").iterdir():
        if MEMORY in str(one.readlink()):
            with one.open("rb") as file:
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return Mailbox(memory, layout_of(memory))
    raise AssertionError(f"process {pid} holds no mailbox")


def _bell(path: str) -> bool:
    return not path or path.startswith("@outrider-")


def _own(pid: int) -> dict[int, tuple[bool, str]]:
    """Whether it listens, and its name, for each unix socket of a process."""
    known = _unix_sockets()
    held = {int(one[8:-1]) for one in descriptors(pid) if one.startswith("socket:[")}
    return {inode: known[inode] for inode in held & set(known)}


def _unix_sockets() -> dict[int, tuple[bool, str]]:
    made = {}
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        path = fields[7] if len(fields) > 7 else ""
        made[int(fields[6])] = (bool(int(fields[3], 16) & LISTENS), path)
    return made


class ToyProcess:
    """A toy service in a process of its own; killed and started again at one address."""

    def __init__(self, role: str, folder: Path, **toy: Any) -> None:
        """``role``: "draft" or "verify"; ``toy``: fields of ``fakes.Toy``."""
        self.role = role
        self.listen = f"unix:{folder}/{role}"
        self.log = folder / f"{role}.log"
        # The model's "folder" exists and holds no tokenizer: requests carry ids.
        self._toy = json.dumps({"model": str(folder)} | toy)
        self._process: BaseProcess | None = None
        self._lifeline: Connection | None = None
        self.start()

    @property
    def pid(self) -> int:
        """Of the process that runs, or ran last."""
        assert self._process is not None and self._process.pid is not None
        return self._process.pid

    def start(self) -> None:
        """Starts it and waits until it serves."""
        # Forked off a process that has imported torch, which is most of what a start takes.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch"])
        word, self._lifeline = context.Pipe(duplex=False)  # closed when we are gone, however
        heard, report = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_serve_toy, args=(word, report, self.log, self.role, self.listen, self._toy)
        )
        self._process.start()
        word.close()
        report.close()
        told = b""
        with heard, open(heard.fileno(), "rb", closefd=False) as lines:
            for line in lines:
                told += line
                if json.loads(line)["event"] == "ready":
                    return
        raise AssertionError(f"{self.role} did not start: {told!r}\n{self.log.read_text()}")

    def signal(self, number: int) -> None:
        """Sends it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it at once, stopped or not."""
        assert self._process is not None and self._lifeline is not None
        self._process.kill()
        self._process.join(10)
        assert self._process.exitcode is not None
        self._lifeline.close()


def _serve_toy(
    word: Connection, report: Connection, log: Path, role: str, listen: str, toy: str
) -> None:
    """In a new process: the toy service, its standard streams being what a supervisor gives."""
    from outrider_testing import toy_service

    os.setsid()
    with log.open("ab") as errors:
        for number, given in enumerate((word.fileno(), report.fileno(), errors.fileno())):
            os.dup2(given, number)
    word.close()
    report.close()
    sys.exit(toy_service.main(role, listen, json.loads(toy)))
