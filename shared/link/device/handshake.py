"""How two processes come to share device memory, over the connection that has handed over the
mailbox: both are known to each other there as this user's processes on this host.

Each side allocates its region, sends the handle, opens the other's and answers the canary that
it finds there. Where either side can't, both do without and both know why.
"""

from __future__ import annotations

import logging
import secrets
import socket
import struct
from dataclasses import dataclass
from typing import Any

import torch

from outrider.shared.core.errors import OutriderError, ProtocolError
from outrider.shared.link.carrier import HostMemoryCarrier
from outrider.shared.link.device import cuda_ipc
from outrider.shared.link.device.mailbox import DeviceLayout, DeviceMailbox, DeviceRegion
from outrider.shared.link.doorbell import Side
from outrider.shared.link.handshake import STEP_SECONDS, Beside
from outrider.shared.link.mailbox import Layout

log = logging.getLogger(__name__)

DEVICE_SECONDS = 10.0
"""How long either side waits for the other where device memory is allocated and mapped."""
MOST_FRAME = 512
_HEAD = struct.Struct("<cH")
_GO, _NO = b"G", b"N"


class NoDeviceMemory(OutriderError):
    """The two share no device memory; the message says why."""

    status = "FAILED_PRECONDITION"


@dataclass(frozen=True, slots=True)
class DeviceSide:
    """What one side brings along."""

    device: torch.device
    ipc: Any = cuda_ipc
    """``device_uuid``, ``why_not``, ``allocate``, ``open_handle`` and ``complete`` as in
    ``cuda_ipc``."""

    @property
    def uuid(self) -> str:
        """Identity of the device, the same for every process."""
        return str(self.ipc.device_uuid(self.device))


def side_of(engine: Any) -> DeviceSide | None:
    """What ``engine`` brings along; None where its device takes no turns by itself."""
    runner: Any = getattr(engine, "runner", None)
    return DeviceSide(runner.storage.device) if hasattr(runner, "turns") else None


class SharedMailbox(DeviceMailbox):
    """A device mailbox together with the memory that it stands in."""

    def __init__(self, own: Any, other: Any, layout: DeviceLayout, side: Side) -> None:
        super().__init__(DeviceRegion(own.tensor, layout), DeviceRegion(other.tensor, layout), side)
        self._memory = (own, other)


class DeviceMemoryCarrier(HostMemoryCarrier):
    """The carrier of links over device memory; a mailbox is shared as well."""

    def _exchange(self, peer: socket.socket, layout: Layout, side: Side) -> Beside:
        """The device's mailbox; the link beneath where it can't be had."""
        peer.settimeout(DEVICE_SECONDS)
        try:
            sizes = DeviceLayout(layout.max_sequences, layout.max_k)
            return Beside(self._link.name, exchange(peer, sizes, side, self._device))
        except NoDeviceMemory as error:
            log.warning("draft and verifier share no device memory: %s", error)
            return Beside(self._link.beneath, reason=str(error))
        finally:
            peer.settimeout(STEP_SECONDS)


def exchange(
    peer: socket.socket,
    layout: DeviceLayout,
    side: Side,
    own: DeviceSide | None,
) -> SharedMailbox:
    """Both sides call this at once; ``own`` None: this one has no device.

    Raises ``NoDeviceMemory`` on both sides where either can't, ``OSError`` where the other side
    hangs up, and ``ProtocolError`` for what is none of this.
    """
    mine = opened = None
    canary = secrets.randbits(64)
    try:
        mine = _allocated(layout, own, side, canary)
        send = (_GO, mine.handle)
    except (OutriderError, RuntimeError) as error:
        send = (_NO, str(error).encode()[:MOST_FRAME])
    handle = _turn(peer, *send)
    assert own is not None and mine is not None
    try:
        opened = own.ipc.open_handle(handle, layout.size, own.device)
        DeviceRegion(opened.tensor, layout).prove()
        own.ipc.complete(own.device)
        send = (_GO, b"")
    except (OutriderError, RuntimeError) as error:
        send = (_NO, str(error).encode()[:MOST_FRAME])
    _turn(peer, *send)
    proven = DeviceRegion(mine.tensor, layout).proven(canary)
    _turn(peer, _GO if proven else _NO, b"" if proven else b"the canary was not answered")
    return SharedMailbox(mine, opened, layout, side)


def _allocated(layout: DeviceLayout, own: DeviceSide | None, side: str, canary: int) -> Any:
    if own is None:
        raise NoDeviceMemory(
            f"the model of the {side} service takes no turns on a device: it does not run on CUDA, "
            "or not by kernels"
        )
    reason = own.ipc.why_not(own.device)
    if reason is not None:
        raise NoDeviceMemory(reason)
    memory = own.ipc.allocate(layout.size, own.device)
    DeviceRegion(memory.tensor, layout).format(canary)
    own.ipc.complete(own.device)  # the other side's stream does not wait for ours
    return memory


def _turn(peer: socket.socket, word: bytes, content: bytes) -> bytes:
    """Says how it stands here, hears how it stands there; goes on only where both can."""
    peer.sendall(_HEAD.pack(word, len(content)) + content)
    theirs, size = _HEAD.unpack(_exactly(peer, _HEAD.size))
    if theirs not in (_GO, _NO) or size > MOST_FRAME:
        raise ProtocolError(f"device memory: not a frame: {theirs!r} of {size} bytes")
    found = _exactly(peer, size)
    if word == _NO:
        raise NoDeviceMemory(content.decode(errors="replace"))
    if theirs == _NO:
        raise NoDeviceMemory("on the other side: " + found.decode(errors="replace"))
    return found


def _exactly(peer: socket.socket, count: int) -> bytes:
    got = b""
    while len(got) < count:
        more = peer.recv(count - len(got))
        if not more:
            raise ConnectionError("the other side hung up")
        got += more
    return got
