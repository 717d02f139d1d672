"""How a mailbox comes to be shared: one process offers it, the other fetches it, both are sure.

The memory has no name. The verifier makes it, and hands its descriptor over a unix socket
(``SCM_RIGHTS``) to a process of the same user (the kernel's word: ``SO_PEERCRED``) that knows
the secret of the offer. The draft checks the header and proves by the canary that it sees the
same memory. The connection then stays as the doorbell. So nothing can be left behind: the
memory is gone with its last process, and there is no handle that a stranger could use.

gRPC only introduces the two, see ``OfferMailbox`` and ``MapMailbox`` in speculation.proto.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import mmap
import os
import platform
import secrets
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from outrider.shared.core.errors import InvalidRequest, OutriderError, ProtocolError
from outrider.shared.link.doorbell import Doorbell, Side, address_of, connected
from outrider.shared.link.mailbox import LAYOUT, Layout, Mailbox, layout_of

if TYPE_CHECKING:
    from outrider.shared.link.device.mailbox import DeviceMailbox

log = logging.getLogger(__name__)

OFFER_SECONDS = 5.0
"""How long an offer stands."""
STEP_SECONDS = 2.0
"""How long either side waits for the other within the hand-over."""
MOST_BYTES = 256 << 20
SECRET_BYTES = 32
_MAPPED, _AGREED = b"M", b"A"


class HandoverFailed(OutriderError):
    """The mailbox can't be had; the message says why."""

    status = "FAILED_PRECONDITION"


@dataclass(frozen=True, slots=True)
class Offered:
    """What the draft must know to fetch a mailbox."""

    mailbox: int
    layout: int
    socket: str
    secret: bytes
    boot_id: str
    size: int
    link: str = ""
    """Name of the link that it is for."""


@dataclass(frozen=True, slots=True)
class Beside:
    """What two that share a mailbox share beside it."""

    link: str
    """Name of the link that this makes."""
    device: DeviceMailbox | None = None
    reason: str = ""
    """Why it is a lesser one than was asked for."""


Exchange = Callable[[socket.socket, Layout, Side], Beside]
"""Called on both sides at once, over the connection that has handed the mailbox over."""


def nothing_beside(peer: socket.socket, layout: Layout, side: Side) -> Beside:
    """A mailbox for its own sake."""
    return Beside("")


class Offer:
    """The verifier's half: a mailbox that waits for its draft, on a thread, for a few seconds."""

    def __init__(
        self,
        layout: Layout,
        claimed: Callable[[int, Doorbell], None],
        *,
        spin: float = 0.0,
        link: str = "",
        exchange: Exchange = nothing_beside,
    ) -> None:
        """``claimed(mailbox, doorbell)`` is called, on that thread, before the draft goes on.

        A draft that hangs up at that very moment leaves it a doorbell that is closed.
        ``link``: what it is for; ``exchange``: what the two share beside the mailbox.
        """
        if layout.size > MOST_BYTES:
            raise InvalidRequest(
                "max_sequences, max_k, row_entries",
                (layout.max_sequences, layout.max_k, layout.row_entries),
                f"such that the mailbox has at most {MOST_BYTES} bytes, not {layout.size}",
            )
        self._layout = layout
        self._claimed = claimed
        self._spin = spin
        self._exchange = exchange
        self._secret = secrets.token_bytes(SECRET_BYTES)
        self._listener, self._path, self._folder = _listen()
        self.offered = Offered(
            secrets.randbits(63) | 1, LAYOUT, self._path, self._secret, boot_id(), layout.size,
            link,
        )  # fmt: skip
        threading.Thread(target=self._serve, name="mailbox offer", daemon=True).start()

    def _serve(self) -> None:
        until = time.monotonic() + OFFER_SECONDS
        try:
            while (left := until - time.monotonic()) > 0:
                self._listener.settimeout(left)
                try:
                    peer, _ = self._listener.accept()
                except TimeoutError:
                    break
                try:
                    self._hand_over(peer)
                except (OSError, OutriderError) as error:
                    # A stranger, or a draft that failed: the offer stands for the right one.
                    log.warning("a hand-over of the mailbox failed: %s", error)
                    peer.close()
                else:
                    return
            log.warning("nobody fetched the mailbox that was offered")
        except OSError:
            log.exception("the offer of a mailbox failed")
        finally:
            self._listener.close()
            if self._folder:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _hand_over(self, peer: socket.socket) -> None:
        peer.settimeout(STEP_SECONDS)
        check_same_user(peer)
        if not hmac.compare_digest(_receive(peer, SECRET_BYTES), self._secret):
            raise HandoverFailed("the other side does not know the secret")
        descriptor = _anonymous_memory(self._layout.size)
        try:
            memory = mmap.mmap(descriptor, self._layout.size)
            mailbox = Mailbox(memory, self._layout)
            canary = secrets.randbits(64)
            mailbox.format(canary)
            socket.send_fds(peer, [_MAPPED], [descriptor])
        finally:
            os.close(descriptor)
        if _receive(peer, 1) != _MAPPED or not mailbox.proven(canary):
            raise HandoverFailed("the other side did not prove that it maps the same memory")
        beside = self._exchange(peer, self._layout, "verify")
        doorbell = _doorbell(mailbox, peer, "verify", self._spin, beside)
        # First known here, then agreed: a grant may follow as soon as the draft has its word.
        self._claimed(self.offered.mailbox, doorbell)
        try:
            peer.sendall(_AGREED)
        except OSError:
            doorbell.close()
            raise


def fetch(offered: Offered, *, spin: float = 0.0, exchange: Exchange = nothing_beside) -> Doorbell:
    """The draft's half: maps what was offered; raises ``HandoverFailed`` saying why it can't."""
    if offered.layout != LAYOUT:
        raise HandoverFailed(f"the mailbox has layout {offered.layout}, this side {LAYOUT}")
    if offered.boot_id != boot_id():
        raise HandoverFailed("draft and verifier do not run on one host")
    if not 0 < offered.size <= MOST_BYTES:
        raise HandoverFailed(f"a mailbox of {offered.size} bytes; at most {MOST_BYTES}")
    try:
        peer = connected(offered.socket, STEP_SECONDS)
    except OSError as error:
        raise HandoverFailed(
            f"the verifier's socket can't be reached ({error.strerror or error}): draft and "
            "verifier may be in different namespaces"
        ) from None
    try:
        check_same_user(peer)
        peer.sendall(offered.secret)
        mailbox = _map(peer, offered.size)
        mailbox.prove()
        peer.sendall(_MAPPED)
        beside = exchange(peer, mailbox.layout, "draft")
        if _receive(peer, 1) != _AGREED:
            raise HandoverFailed("the verifier did not accept the proof")
    except (OSError, ValueError, ProtocolError) as error:
        peer.close()
        raise HandoverFailed(f"the mailbox can't be mapped: {error}") from None
    except BaseException:
        peer.close()
        raise
    return _doorbell(mailbox, peer, "draft", spin, beside)


def _doorbell(
    mailbox: Mailbox, peer: socket.socket, side: Side, spin: float, beside: Beside
) -> Doorbell:
    made = Doorbell(mailbox, peer, side, spin=spin)
    made.link, made.device, made.reason = beside.link, beside.device, beside.reason
    return made


def boot_id() -> str:
    """Identity of the running system; differs between hosts, and between starts where it can."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{platform.node()}-{uuid.getnode():x}"


def check_same_user(peer: socket.socket) -> None:
    """Raises ``HandoverFailed`` unless the process at the other end is this user's."""
    if sys.platform == "darwin":
        # struct xucred of LOCAL_PEERCRED (1) at level SOL_LOCAL (0): version, then the user.
        _, user = struct.unpack_from("<II", peer.getsockopt(0, 1, 76))
    else:
        credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        _, user, _ = struct.unpack("<iII", credentials)
    if user != os.geteuid():
        raise HandoverFailed(f"the other side belongs to user {user}, this one to {os.geteuid()}")


def _map(peer: socket.socket, size: int) -> Mailbox:
    """Takes the descriptor that ``peer`` hands over and maps it."""
    _, descriptors, _, _ = socket.recv_fds(peer, 1, 1)
    if len(descriptors) != 1:
        for one in descriptors:
            os.close(one)
        raise HandoverFailed("the verifier hung up: it does not take this process for the draft")
    (descriptor,) = descriptors
    try:
        held = os.fstat(descriptor).st_size
        if held != size:
            raise HandoverFailed(f"the mailbox has {held} bytes, {size} were offered")
        memory = mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)
    return Mailbox(memory, layout_of(memory))


def _listen() -> tuple[socket.socket, str, str]:
    """A listening socket, its path, and the folder to remove afterwards ("" for none)."""
    folder = ""
    if sys.platform == "linux":
        path = f"@outrider-{secrets.token_hex(16)}"  # no file that could be left behind
    else:
        folder = tempfile.mkdtemp(prefix="outrider-")  # mode 0700
        path = str(Path(folder) / "mailbox")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(address_of(path))
        listener.listen(4)
    except BaseException:
        listener.close()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return listener, path, folder


def _anonymous_memory(size: int) -> int:
    """A descriptor of memory without a name, of a size that nobody can change where possible."""
    if hasattr(os, "memfd_create"):
        import fcntl

        descriptor = os.memfd_create("outrider-mailbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, size)
        # A peer that shrank it would have us killed by SIGBUS.
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        return descriptor
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        return os.dup(file.fileno())


def _receive(peer: socket.socket, count: int) -> bytes:
    """Exactly ``count`` bytes, or fewer where the peer hung up."""
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while len(got) < count and (more := peer.recv(count - len(got))):
            got += more
    return got
