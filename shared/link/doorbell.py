"""Ringing and waiting: when a slot of the mailbox may be read, and whether the other side lives.

A ring is one byte over a unix socket. Sending and receiving it order the memory around them, it
sleeps without polling, it works wherever Python has unix sockets, and when a process is gone,
however it went, the kernel tells the other one at once. What the kernel does not tell is a
process that stands still (stopped, or its interpreter stuck): for that each side counts a beat
in the mailbox, on a thread of its own, and the other side watches it.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from outrider.shared.core.errors import ProtocolError
from outrider.shared.link.mailbox import (
    BEATS,
    BELLS,
    ENDS,
    PREPARED,
    Mailbox,
    ProposalHead,
    VerdictHead,
)

if TYPE_CHECKING:
    from outrider.shared.link.device.mailbox import DeviceMailbox

BEAT_SECONDS = 0.1
_LOOK_SECONDS = 0.005
STALE_SECONDS = 1.5
"""A beat that did not rise for so long: the other side stands still."""

Side = Literal["verify", "draft"]
HeadT = TypeVar("HeadT", ProposalHead, VerdictHead)
Found = TypeVar("Found")
_INDEX = {"verify": 0, "draft": 1}
_NAMES = ("verifier", "draft")
_YIELD: Callable[[], None] = getattr(os, "sched_yield", lambda: time.sleep(0))


class PeerGone(Exception):
    """The other side of the mailbox is gone, stands still, or broke the protocol."""


class PeerLate(PeerGone):
    """The other side lives and did not ring in time; it may yet do so."""


class Doorbell:
    """One side of a mailbox. One thread rings and waits; ``close`` may come from any."""

    def __init__(
        self,
        mailbox: Mailbox,
        peer: socket.socket,
        side: Side,
        *,
        spin: float = 0.0,
    ) -> None:
        """Takes over the connected ``peer``.

        ``spin``: seconds to watch for the ring before sleeping. A core that sleeps takes longer
        to wake than the ring to travel, and its caches are cold then.
        """
        self.mailbox = mailbox
        self._peer = peer
        self._mine, self._other = _INDEX[side], 1 - _INDEX[side]
        self._spin = spin
        self._rings = 0
        self.link = ""
        """Name of the link that the two share."""
        self.reason = ""
        """Why it is a lesser one than was asked for."""
        self.device: DeviceMailbox | None = None
        """What they share in device memory."""
        self.turns: Any = None
        """This side's turns over it, once there are any."""
        self.prepared = threading.Event()
        """Not set while this side does what it does with a mailbox before it is used."""
        self.set_prepared()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        peer.setblocking(False)
        self._poll = select.poll()
        self._poll.register(peer, select.POLLIN)
        self._beating = threading.Thread(target=self._beat, name="mailbox beat", daemon=True)
        self._beating.start()

    @property
    def closed(self) -> bool:
        """Whether this side has let go of the mailbox."""
        return self._closed.is_set()

    def ring(self) -> None:
        """Tells the other side that a slot is filled; raises ``PeerGone``."""
        self._rings += 1
        self.mailbox.set_word(BELLS[self._mine], self._rings)
        try:
            self._peer.send(b"\1")
        except BlockingIOError:
            pass  # it has thousands of rings to hear already: one more makes no difference
        except OSError as error:
            raise PeerGone(f"the {_NAMES[self._other]} has let go of the mailbox") from error

    def wait(self, patience: float, interrupted: Callable[[], bool] = lambda: False) -> bool:
        """Until the other side rings; False where ``interrupted`` became true first.

        Raises ``PeerGone`` when it is gone or stands still, ``PeerLate`` when it did not ring
        for ``patience`` seconds.
        """
        watch = Watch(self, patience)
        if self._spin:
            self._look(time.monotonic() + self._spin)
        while True:
            if self._poll.poll(1000 * BEAT_SECONDS) and self._hear():
                return True
            if not self.closed and interrupted():
                return False
            watch.check()

    def await_turn(
        self,
        turn: tuple[int, int],
        read: Callable[[], tuple[HeadT, Found] | None],
        patience: float,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> tuple[HeadT, Found] | None:
        """What the other side wrote for ``turn`` (grant, step); None where interrupted first.

        ``read`` is one of the mailbox's two. Rings left over from earlier grants are passed
        over. The other side may have left this grant in a later turn, in the place of what was
        waited for: that is returned. Raises ``PeerGone``, and ``ProtocolError`` for any other
        turn that is yet to come.
        """
        while self.wait(patience, interrupted):
            found = read()
            if found is None:
                continue  # being written: its own ring is still to come
            there = (found[0].grant, found[0].step)
            left = found[0].flags & ENDS and not found[1] and there[0] == turn[0]
            if there == turn or (left and there > turn):
                return found
            if there > turn:
                raise ProtocolError(f"grant, round {there} came while {turn} was waited for")
        return None

    def rung(self) -> bool:
        """Whether the other side has rung since it was last heard; raises ``PeerGone``."""
        return bool(self._poll.poll(0)) and self._hear()

    def others_beat(self) -> int:
        """How often the other side's process has counted that it runs."""
        return self.mailbox.word(BEATS[self._other])

    @property
    def other(self) -> str:
        """What the other side is, for a person."""
        return _NAMES[self._other]

    def set_prepared(self) -> None:
        """This side is prepared, which the other one may ask."""
        self.mailbox.set_word(PREPARED[self._mine], 1)
        self.prepared.set()

    def unset_prepared(self) -> None:
        """This side has yet to prepare."""
        self.mailbox.set_word(PREPARED[self._mine], 0)
        self.prepared.clear()

    def await_prepared(self, patience: float) -> bool:
        """Whether both sides are prepared, for which it waits up to ``patience`` seconds."""
        until = time.monotonic() + patience
        if not self.prepared.wait(patience):
            return False
        while not self.mailbox.word(PREPARED[self._other]):
            if time.monotonic() > until or not self.alive():
                return False
            time.sleep(_LOOK_SECONDS)
        return True

    def alive(self) -> bool:
        """Whether the other side still holds the mailbox, as far as the kernel knows."""
        # Reading would not tell while a ring is unheard. A poll of its own: they can't be shared.
        poll = select.poll()
        try:
            poll.register(self._peer, select.POLLIN | select.POLLHUP)
        except (OSError, ValueError):
            return False  # closed meanwhile
        gone = select.POLLHUP | select.POLLERR | select.POLLNVAL
        return not self.closed and not any(events & gone for _, events in poll.poll(0))

    def close(self) -> None:
        """Lets go of the mailbox; the other side is told by the kernel. May be called again.

        The memory is unmapped with the last reference: another thread may still be reading it.
        """
        with self._lock:
            if self.closed:
                return
            self._closed.set()
        with contextlib.suppress(OSError):
            # Wakes whoever waits here, which closing alone would not.
            self._peer.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._beating:
            self._beating.join()
        self._peer.close()

    # --- parts -----------------------------------------------------------------------------------

    def _look(self, until: float) -> None:
        poll, now = self._poll.poll, time.monotonic
        # Each look lets the process's other threads have the interpreter, and whoever wants the
        # core has it first.
        while not poll(0) and now() < until:
            _YIELD()

    def _hear(self) -> bool:
        try:
            rings = self._peer.recv(4096)
        except BlockingIOError:
            return False
        except OSError:
            rings = b""
        if not rings:
            raise PeerGone(f"the {_NAMES[self._other]} has let go of the mailbox")
        return True

    def _beat(self) -> None:
        count = 0
        while not self._closed.wait(BEAT_SECONDS):
            count += 1
            self.mailbox.set_word(BEATS[self._mine], count)


class Watch:
    """Whether the other side of a doorbell lives and answers in time, over several looks."""

    def __init__(self, doorbell: Doorbell, patience: float) -> None:
        """``patience``: seconds within which it is to answer."""
        self.doorbell = doorbell
        self._patience = patience
        self._beat = doorbell.others_beat()
        self._began = self._beat_at = time.monotonic()

    def reset(self) -> None:
        """It has answered; its time for the next answer begins."""
        self._began = time.monotonic()

    def check(self) -> None:
        """Raises ``PeerGone`` where it is gone or stands still, ``PeerLate`` where it is late."""
        if self.doorbell.closed:
            raise PeerGone("the mailbox was closed")
        now = time.monotonic()
        beat = self.doorbell.others_beat()
        if beat != self._beat:
            self._beat, self._beat_at = beat, now
        elif now - self._beat_at > STALE_SECONDS:
            raise PeerGone(f"the {self.doorbell.other} stands still")
        if now - self._began > self._patience:
            raise PeerLate(f"the {self.doorbell.other} did not answer in {self._patience:g} s")


def connected(path: str, timeout: float) -> socket.socket:
    """A connection to the unix socket at ``path``, "@name" being an abstract one."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.settimeout(timeout)
        made.connect(address_of(path))
    except BaseException:
        made.close()
        raise
    return made


def address_of(path: str) -> Any:
    """What ``bind`` and ``connect`` take for ``path``."""
    return "\0" + path[1:] if path.startswith("@") else path
