"""Offers that can't be taken: the draft says what is wrong with them and keeps nothing."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from outrider.shared.link import handshake
from outrider.shared.link.doorbell import Doorbell, address_of
from outrider.shared.link.handshake import HandoverFailed, Offer, Offered, boot_id, fetch
from outrider.shared.link.mailbox import LAYOUT, Layout, Mailbox
from outrider_testing.processes import held
from outrider_testing.waiting import soon

SMALL = Layout(2, 3, 4)
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def refused(offered: Offered) -> str:
    """What ``fetch`` says; the error and all that it holds on to is gone by then."""
    try:
        fetch(offered).close()
    except HandoverFailed as error:
        assert error.status == "FAILED_PRECONDITION"
        return str(error)
    pytest.fail("it was not refused")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layout": LAYOUT + 1}, f"has layout {LAYOUT + 1}, this side {LAYOUT}"),
        ({"boot_id": "elsewhere"}, "draft and verifier do not run on one host"),
        ({"boot_id": ""}, "draft and verifier do not run on one host"),
        ({"size": 0}, f"a mailbox of 0 bytes; at most {handshake.MOST_BYTES}"),
        ({"size": handshake.MOST_BYTES + 1}, f"a mailbox of {handshake.MOST_BYTES + 1} bytes"),
        ({"size": 4095}, "the mailbox has 4096 bytes, 4095 were offered"),
        ({"size": 8192}, "the mailbox has 4096 bytes, 8192 were offered"),
        ({"socket": "/nowhere/at/all"}, "can't be reached (No such file or directory)"),
        ({"socket": "/" + "x" * 200}, "can't be reached (AF_UNIX path too long)"),
    ],
)
def test_fetch_refuses_an_offer_that_can_not_be(changes: dict[str, Any], says: str) -> None:
    claims: list[Doorbell] = []
    offered = Offer(SMALL, lambda _, doorbell: claims.append(doorbell)).offered
    assert offered.size == 4096
    assert says in refused(replace(offered, **changes))
    assert not claims
    fetch(offered).close()  # the offer itself still stands
    claims[0].close()


@contextlib.contextmanager
def pretender(answer: Callable[[socket.socket], None], path: str) -> Iterator[Offered]:
    """Somebody in the verifier's place, who answers the secret as ``answer`` does."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address_of(path))
        listener.listen(1)
        listener.settimeout(60.0)

        def serve() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.settimeout(60.0)
                assert peer.recv(64) == b"s" * 32
                answer(peer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Offered(1, LAYOUT, path, b"s" * 32, boot_id(), SMALL.size)
        finally:
            thread.join()


@pytest.fixture
def path(short_folder: Path) -> str:
    return str(short_folder / secrets.token_hex(4))


@contextlib.contextmanager
def memory(size: int = SMALL.size, mode: int = os.O_RDWR) -> Iterator[int]:
    """A file that holds a mailbox as far as it reaches."""
    whole = bytearray(SMALL.size)
    Mailbox(whole, SMALL).format(5)
    with tempfile.NamedTemporaryFile(prefix="outrider-mailbox-") as file:
        Path(file.name).write_bytes(whole[:size])
        descriptor = os.open(file.name, mode)
        yield descriptor
        os.close(descriptor)


def hand(peer: socket.socket, *descriptors: int) -> None:
    socket.send_fds(peer, [b"M"], descriptors)


def hangs_up(peer: socket.socket) -> None:
    pass


def hands_over_nothing(peer: socket.socket) -> None:
    peer.sendall(b"M")


def hands_over_a_short_file(peer: socket.socket) -> None:
    with memory(1024) as descriptor:
        hand(peer, descriptor)


def hands_over_several(peer: socket.socket) -> None:
    with memory(1024) as short, memory() as right:
        hand(peer, short, right, right)


def hands_over_a_pipe(peer: socket.socket) -> None:
    ends = os.pipe()
    hand(peer, ends[1])
    for one in ends:
        os.close(one)


def hands_over_what_can_not_be_written(peer: socket.socket) -> None:
    with memory(mode=os.O_RDONLY) as descriptor:
        hand(peer, descriptor)


def does_not_agree(peer: socket.socket) -> None:
    with memory() as descriptor:
        hand(peer, descriptor)
        assert peer.recv(1) == b"M"


def answers_the_proof_with_something_else(peer: socket.socket) -> None:
    does_not_agree(peer)
    peer.sendall(b"X")


@linux
@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (hangs_up, "the verifier hung up: it does not take this process for the draft"),
        (hands_over_nothing, "the verifier hung up"),
        (hands_over_a_short_file, "the mailbox has 1024 bytes, 4096 were offered"),
        (hands_over_several, "the mailbox has 1024 bytes, 4096 were offered"),
        (hands_over_a_pipe, "the mailbox has 0 bytes, 4096 were offered"),
        (hands_over_what_can_not_be_written, "the mailbox can't be mapped: [Errno 13]"),
        (does_not_agree, "the verifier did not accept the proof"),
        (answers_the_proof_with_something_else, "the verifier did not accept the proof"),
    ],
)
def test_fetch_refuses_a_verifier_that_is_none(
    path: str, answer: Callable[[socket.socket], None], says: str
) -> None:
    before = held()
    with pretender(answer, path) as offered:
        assert says in refused(offered)
    soon(lambda: not held() - before)


def test_fetch_does_not_wait_for_a_silent_verifier(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake, "STEP_SECONDS", 0.05)
    with pretender(lambda peer: hangs_up(peer) if peer.recv(1) else None, path) as offered:
        assert "the mailbox can't be mapped: timed out" in refused(offered)


@pytest.mark.parametrize(
    ("offset", "kind", "value", "says"),
    [
        (0, "<B", 0x6F, "not a mailbox: it begins with b'oUTRIDER'"),
        (8, "<I", LAYOUT + 1, f"mailbox layout {LAYOUT + 1}; this side has {LAYOUT}"),
        (12, "<I", 40, "mailbox layout"),
        (16, "<Q", 8192, "has 4096 bytes; this one says 8192 and has 4096"),
        (24, "<I", 1025, "mailbox max_sequences: got 1025"),
        (24, "<I", 200, "a mailbox for 200 sequences of 3 tokens has"),
    ],
)
def test_fetch_refuses_a_header_that_is_wrong(
    path: str, offset: int, kind: str, value: int, says: str
) -> None:
    def answer(peer: socket.socket) -> None:
        with memory() as descriptor:
            os.pwrite(descriptor, struct.pack(kind, value), offset)
            hand(peer, descriptor)
            assert peer.recv(1) == b""  # no proof for this one

    with pretender(answer, path) as offered:
        message = refused(offered)
    assert message.startswith("the mailbox can't be mapped: ") and says in message
