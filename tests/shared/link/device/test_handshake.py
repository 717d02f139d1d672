"""Device memory is exchanged by both or by neither, and both know why."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest
import torch

from outrider.shared.core.errors import ProtocolError
from outrider.shared.link.device.handshake import DeviceSide, NoDeviceMemory, exchange
from outrider.shared.link.device.mailbox import DeviceLayout
from outrider_testing import host_device

LAYOUT = DeviceLayout(2, 3)
CPU = torch.device("cpu")


def both(verify: DeviceSide | None, draft: DeviceSide | None) -> list[Any]:
    """What each side gets or raises."""
    ends = socket.socketpair()
    found: list[Any] = [None, None]

    def side(index: int, name: Any, own: DeviceSide | None) -> None:
        ends[index].settimeout(60.0)
        try:
            found[index] = exchange(ends[index], LAYOUT, name, own)
        except Exception as error:
            found[index] = error
            ends[index].close()

    threads = [
        threading.Thread(target=side, args=(0, "verify", verify)),
        threading.Thread(target=side, args=(1, "draft", draft)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for end in ends:
        end.close()
    return found


def test_exchange_gives_both_sides_the_same_memory() -> None:
    memory = host_device.HostMemory()
    verify, draft = both(DeviceSide(CPU, memory), DeviceSide(CPU, memory))
    assert len(memory.allocated) == 2
    draft.proposals.fill_(5)
    draft.rung.fill_(1)
    assert verify.proposals.tolist() == [[5] * 3] * 2 and verify.heard.item() == 1
    verify.verdicts.fill_(6)
    verify.rung.fill_(2)
    assert draft.verdicts.tolist() == [[6] * 4] * 2 and draft.heard.item() == 2


def test_exchange_begins_with_bells_that_have_not_rung() -> None:
    memory = host_device.HostMemory()
    for side in both(DeviceSide(CPU, memory), DeviceSide(CPU, memory)):
        assert side.heard.item() == side.rung.item() == 0 and not side.verdicts.any()


@pytest.mark.parametrize("without", [0, 1])
def test_exchange_fails_on_both_sides_where_one_has_no_device(without: int) -> None:
    sides: list[DeviceSide | None] = [DeviceSide(CPU, host_device.HostMemory())] * 2
    sides[without] = None
    found = both(*sides)
    assert all(isinstance(one, NoDeviceMemory) for one in found)
    role = ("verify", "draft")[without]
    says = f"the model of the {role} service takes no turns on a device"
    assert str(found[without]).startswith(says)
    assert str(found[1 - without]).startswith(f"on the other side: {says}")


def test_exchange_on_a_device_without_cuda_says_so() -> None:
    for one in both(DeviceSide(CPU), DeviceSide(CPU)):
        assert isinstance(one, NoDeviceMemory) and str(one) == "the model runs on cpu"


def test_exchange_of_handles_that_cannot_be_opened_fails_on_both_sides() -> None:
    # Two memories that know nothing of each other, as on two hosts.
    found = both(
        DeviceSide(CPU, host_device.HostMemory()), DeviceSide(CPU, host_device.HostMemory())
    )
    for one in found:
        assert isinstance(one, NoDeviceMemory) and "invalid handle" in str(one)


def test_exchange_of_memory_that_is_not_the_same_fails_on_both_sides() -> None:
    class Copies(host_device.HostMemory):  # type: ignore[misc,name-defined]
        def open_handle(self, raw: bytes, size: int, where: torch.device) -> Any:
            return host_device.Allocation(super().open_handle(raw, size, where).tensor.clone(), b"")

    memory = Copies()
    for one in both(DeviceSide(CPU, memory), DeviceSide(CPU, memory)):
        assert isinstance(one, NoDeviceMemory) and "canary was not answered" in str(one)


def test_exchange_waits_until_the_device_has_written() -> None:
    class Late(host_device.HostMemory):  # type: ignore[misc,name-defined]
        """What is written in memory of one's own or another's stands there once complete."""

        def __init__(self, allocated: dict[bytes, torch.Tensor]) -> None:
            self.allocated, self.written = allocated, []

        def seen(self, made: Any, real: torch.Tensor) -> Any:
            made.tensor = real.clone()
            self.written.append((made.tensor, made.tensor.clone(), real))
            return made

        def allocate(self, size: int, where: torch.device) -> Any:
            made = super().allocate(size, where)
            return self.seen(made, made.tensor)

        def open_handle(self, raw: bytes, size: int, where: torch.device) -> Any:
            made = super().open_handle(raw, size, where)
            return self.seen(made, made.tensor)

        def complete(self, where: torch.device) -> None:
            while self.written:
                own, before, real = self.written.pop()
                real[own != before] = own[own != before]
                own.set_(real)

    allocated: dict[bytes, torch.Tensor] = {}
    for one in both(DeviceSide(CPU, Late(allocated)), DeviceSide(CPU, Late(allocated))):
        assert not isinstance(one, Exception), one


@pytest.mark.parametrize(
    ("sent", "error"),
    [(b"", ConnectionError), (b"G\x40", ConnectionError), (b"X\0\0", ProtocolError),
     (b"G\xff\xff", ProtocolError), (b"G\x03\0abcG\0\0", NoDeviceMemory)],
)  # fmt: skip
def test_exchange_with_something_else_ends_with_an_error(
    sent: bytes, error: type[Exception]
) -> None:
    ends = socket.socketpair()
    ends[0].settimeout(60.0)
    ends[1].sendall(sent)
    ends[1].shutdown(socket.SHUT_WR)
    with pytest.raises(error):
        exchange(ends[0], LAYOUT, "verify", DeviceSide(CPU, host_device.HostMemory()))
    for end in ends:
        end.close()
