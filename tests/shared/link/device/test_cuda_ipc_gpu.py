"""Device memory between two processes, and streams that wait for each other, on a real device."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch

from outrider.shared.link.device import cuda_ipc
from outrider.shared.link.device.driver import CudaDriverError
from outrider.shared.link.device.mailbox import DeviceLayout, DeviceRegion
from outrider.shared.model.cuda.graphs import Graphs
from outrider.shared.model.cuda.turns.stream import CudaStream

pytestmark = pytest.mark.gpu
LAYOUT = DeviceLayout(4, 4)
ROUNDS = 100

CHILD = """
import sys, torch
from outrider.shared.link.device import cuda_ipc
from outrider.shared.model.cuda.turns.stream import CudaStream
from outrider.shared.model.cuda.graphs import Graphs
from outrider.shared.link.device.mailbox import DeviceLayout, DeviceRegion
layout, device = DeviceLayout(4, 4), torch.device("cuda", 0)
other = cuda_ipc.open_handle(bytes.fromhex(sys.stdin.readline()), layout.size, device)
own = cuda_ipc.allocate(layout.size, device)
mine, theirs = DeviceRegion(own.tensor, layout), DeviceRegion(other.tensor, layout)
mine.format(1)
theirs.prove()
cuda_ipc.complete(device)
print(own.handle.hex(), flush=True)
stream = CudaStream(device, Graphs(enabled=True))
def add():
    theirs.proposals.copy_(mine.proposals + 1)
for _ in range(2):  # the second time it is captured, which waits for the device
    stream.run("turn", add)
cuda_ipc.complete(device)
print("ready", flush=True)
for turn in range(2, 2 + int(sys.stdin.readline())):
    stream.wait(mine.bell, turn)
    stream.run("turn", add)
    stream.write(theirs.bell, turn)
print("queued", flush=True)
torch.cuda.synchronize()
print("done", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.kill()
    process.wait()
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    process.stdout.close()


def test_streams_of_two_processes_take_turns_in_device_memory(
    child: subprocess.Popen[str],
) -> None:
    assert child.stdin is not None and child.stdout is not None
    device = torch.device("cuda", 0)
    assert cuda_ipc.why_not(device) is None
    own = cuda_ipc.allocate(LAYOUT.size, device)
    mine = DeviceRegion(own.tensor, LAYOUT)
    mine.format(0xABCDEF)
    cuda_ipc.complete(device)
    print(own.handle.hex(), file=child.stdin, flush=True)
    other = cuda_ipc.open_handle(bytes.fromhex(child.stdout.readline()), LAYOUT.size, device)
    theirs = DeviceRegion(other.tensor, LAYOUT)
    assert mine.proven(0xABCDEF)
    stream = CudaStream(device, Graphs(enabled=True))

    def add() -> None:
        theirs.proposals.copy_(mine.proposals + 1)

    for _ in range(2):  # the second time it is captured, which waits for the device
        stream.run("turn", add)
    cuda_ipc.complete(device)
    assert child.stdout.readline() == "ready\n"
    for region in (mine, theirs):
        region.proposals.zero_()
    # Queued ahead by both sides, all of them: no processor stands between the turns.
    stream.wait(mine.bell, 1)
    began = stream.mark()
    for turn in range(2, 2 + ROUNDS):
        stream.run("turn", add)
        stream.write(theirs.bell, turn)
        stream.wait(mine.bell, turn)
    done = stream.mark()
    print(ROUNDS, file=child.stdin, flush=True)
    assert child.stdout.readline() == "queued\n"
    stream.release(mine.bell, 1)
    torch.cuda.synchronize()
    assert child.stdout.readline() == "done\n"
    assert mine.proposals.unique().tolist() == [2 * ROUNDS]
    print(f"{1e6 * done.seconds_after(began) / ROUNDS:.1f} µs a turn pair")
    other.close()
    print("bye", file=child.stdin, flush=True)


def test_stream_that_waits_is_released_by_its_own_host() -> None:
    device = torch.device("cuda", 0)
    own = cuda_ipc.allocate(LAYOUT.size, device)
    region = DeviceRegion(own.tensor, LAYOUT)
    region.format(1)
    stream = CudaStream(device, Graphs(enabled=False))
    stream.wait(region.bell, 5)
    mark = stream.mark()
    time.sleep(0.2)
    assert not mark.reached()
    stream.release(region.bell, 5)
    until = time.monotonic() + 2
    while not mark.reached():
        assert time.monotonic() < until


def test_memory_is_given_back() -> None:
    device = torch.device("cuda", 0)
    cuda_ipc.allocate(1 << 20, device).close()
    before, _ = torch.cuda.mem_get_info(device)
    for _ in range(20):
        cuda_ipc.allocate(64 << 20, device).close()
    assert torch.cuda.mem_get_info(device)[0] >= before - (64 << 20)


def test_handle_that_is_none_is_refused() -> None:
    device = torch.device("cuda", 0)
    for raw in (b"", b"\1" * 64):
        with pytest.raises(CudaDriverError):
            cuda_ipc.open_handle(raw, LAYOUT.size, device)
