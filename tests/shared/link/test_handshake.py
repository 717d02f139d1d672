"""The hand-over: the right draft gets the memory, a stranger does not, and nothing is left."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from outrider.shared.core.errors import InvalidRequest
from outrider.shared.core.types import Proposal
from outrider.shared.link import handshake
from outrider.shared.link.doorbell import Doorbell, PeerGone, connected
from outrider.shared.link.handshake import HandoverFailed, Offer, Offered, boot_id, fetch
from outrider.shared.link.mailbox import (
    LAYOUT,
    MAGIC,
    Judgement,
    Layout,
    Mailbox,
    ProposalHead,
    VerdictHead,
)
from outrider_testing.processes import held
from outrider_testing.waiting import soon

Start = Callable[[str, Offered], subprocess.Popen[str]]
SMALL = Layout(2, 3, 4)
NOBODY = 65534
VERDICT, PROPOSAL = Judgement(1, 1, 2, 9, 43, 3), Proposal(1, 1, 43, (5, 6, 7), ())
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")

CHILD = """
import os, socket, sys
from outrider.shared.link.doorbell import connected
from outrider.shared.link.handshake import HandoverFailed, Offered, fetch
from outrider.shared.link.mailbox import ProposalHead
from outrider.shared.core.types import Proposal
offered = eval(sys.stdin.readline())
"""
DRAFT = """
bell = fetch(offered)
while True:
    head, verdicts = bell.await_turn((7, 0), bell.mailbox.read_verdicts, 3600.0)
    tokens = tuple(verdicts[0].next_token + i for i in range(3))
    bell.mailbox.write_proposals(ProposalHead(7, 0), [Proposal(1, 1, 43, tokens, ())])
    bell.ring()
"""
OTHER_USER_FETCHES = f"""
os.setuid({NOBODY})
try:
    fetch(offered)
except HandoverFailed as error:
    print(error)
"""
OTHER_USER_ASKS = f"""
os.setuid({NOBODY})
with connected(offered.socket, 60.0) as peer:
    try:
        peer.sendall(offered.secret)
        print(socket.recv_fds(peer, 1, 1)[:2])
    except ConnectionError:
        print((b"", []))
"""


class Verifier:
    """An offer, and the doorbell of the draft that took it."""

    def __init__(self) -> None:
        self._claims: queue.SimpleQueue[tuple[int, Doorbell]] = queue.SimpleQueue()
        before = set(threading.enumerate())
        self.offered = Offer(SMALL, lambda *claim: self._claims.put(claim)).offered
        (self.thread,) = set(threading.enumerate()) - before

    def claimed(self) -> Doorbell:
        mailbox, doorbell = self._claims.get_nowait()
        assert mailbox == self.offered.mailbox
        return doorbell

    def finish(self) -> None:
        with contextlib.suppress(HandoverFailed):
            fetch(self.offered).close()  # an offer that still stands would last for seconds
        while not self._claims.empty():
            self._claims.get()[1].close()


@pytest.fixture
def verifier(monkeypatch: pytest.MonkeyPatch) -> Iterator[Verifier]:
    # A process that fetches it may take long to start.
    monkeypatch.setattr(handshake, "OFFER_SECONDS", 60.0)
    made = Verifier()
    yield made
    monkeypatch.undo()
    made.finish()


@pytest.fixture
def child() -> Iterator[Start]:
    """Starts a process that knows the offer, and kills what the test left of it."""
    running: list[subprocess.Popen[str]] = []

    def start(script: str, offered: Offered) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", CHILD + script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        assert process.stdin is not None
        process.stdin.write(f"{offered!r}\n")
        process.stdin.close()
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.read().strip()


def mappings() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:outrider-mailbox")


def refused(offered: Offered) -> str:
    """What ``fetch`` says; the error and all that it holds on to is gone by then."""
    try:
        fetch(offered).close()
    except HandoverFailed as error:
        assert error.status == "FAILED_PRECONDITION"
        return str(error)
    pytest.fail("it was not refused")


def exchange(verify: Doorbell, draft: Doorbell) -> None:
    verify.mailbox.write_verdicts(VerdictHead(7, 0), [VERDICT])
    verify.ring()
    heard = draft.await_turn((7, 0), draft.mailbox.read_verdicts, 60.0)
    assert heard == (VerdictHead(7, 0), [VERDICT])
    draft.mailbox.write_proposals(ProposalHead(7, 1), [PROPOSAL])
    draft.ring()
    told = verify.await_turn((7, 1), verify.mailbox.read_proposals, 60.0)
    assert told == (ProposalHead(7, 1), [PROPOSAL])


def still_stands(verifier: Verifier) -> None:
    """The right draft gets the mailbox, whoever came before it."""
    draft = fetch(verifier.offered)
    verify = verifier.claimed()
    exchange(verify, draft)
    draft.close()
    verify.close()


def take(offered: Offered) -> tuple[socket.socket, int, Mailbox]:
    """What a process of the same user that knows the secret gets, up to the proof."""
    peer = connected(offered.socket, 60.0)
    peer.sendall(offered.secret)
    said, (descriptor,), _, _ = socket.recv_fds(peer, 1, 8)
    assert said == b"M"
    return peer, descriptor, Mailbox(mmap.mmap(descriptor, offered.size), SMALL)


# --- the right draft -----------------------------------------------------------------------------


def test_offer_says_what_the_draft_must_know(verifier: Verifier) -> None:
    offered = verifier.offered
    assert (offered.layout, offered.size, offered.boot_id) == (LAYOUT, SMALL.size, boot_id())
    assert 0 < offered.mailbox < 1 << 63 and len(offered.secret) == 32
    other = Verifier()
    for name in ("mailbox", "secret", "socket"):
        assert getattr(other.offered, name) != getattr(offered, name)
    other.finish()


def test_fetch_by_the_right_draft_shares_the_memory(verifier: Verifier) -> None:
    draft = fetch(verifier.offered)
    verify = verifier.claimed()
    assert draft.mailbox.layout == verify.mailbox.layout == SMALL
    exchange(verify, draft)
    draft.close()
    assert not verify.alive()
    verify.close()


@linux
def test_fetch_in_another_process_shares_the_memory_and_a_kill_frees_it(
    verifier: Verifier, child: Start
) -> None:
    before = mappings()
    process = child(DRAFT, verifier.offered)
    soon(lambda: not verifier._claims.empty())
    verify = verifier.claimed()
    maps = Path(f"/proc/{process.pid}/maps")
    soon(lambda: "memfd:outrider-mailbox" in maps.read_text())
    verify.mailbox.write_verdicts(VerdictHead(7, 0), [VERDICT])
    verify.ring()
    told = verify.await_turn((7, 0), verify.mailbox.read_proposals, 60.0)
    assert told == (ProposalHead(7, 0), [replace(PROPOSAL, tokens=(9, 10, 11))])
    assert mappings() == before + 1
    process.kill()
    with pytest.raises(PeerGone, match="the draft has let go"):
        verify.wait(60.0)
    assert not verify.alive()
    verify.close()
    del verify
    soon(lambda: mappings() == before)


def test_fetch_returns_when_the_verifier_knows_its_mailbox() -> None:
    known: list[Doorbell] = []

    def claimed(_: int, doorbell: Doorbell) -> None:
        time.sleep(0.1)
        known.append(doorbell)

    draft = fetch(Offer(SMALL, claimed).offered)
    assert len(known) == 1
    exchange(known[0], draft)
    draft.close()
    known[0].close()


def test_offer_that_was_taken_is_over(verifier: Verifier) -> None:
    draft = fetch(verifier.offered)
    verifier.thread.join(60)
    assert not verifier.thread.is_alive()
    assert "the verifier's socket can't be reached (Connection refused)" in refused(
        verifier.offered
    )
    draft.close()


def test_offer_goes_to_one_of_many_drafts(verifier: Verifier) -> None:
    got: queue.SimpleQueue[Doorbell | str] = queue.SimpleQueue()

    def attempt() -> None:
        try:
            got.put(fetch(verifier.offered))
        except HandoverFailed as error:
            got.put(str(error))

    threads = [threading.Thread(target=attempt) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    results = [got.get(timeout=60) for _ in threads]
    (draft,) = [one for one in results if isinstance(one, Doorbell)]
    verify = verifier.claimed()
    exchange(verify, draft)
    draft.close()
    verify.close()


# --- strangers -----------------------------------------------------------------------------------


def test_offer_refuses_a_wrong_secret(verifier: Verifier, caplog: pytest.LogCaptureFixture) -> None:
    says = refused(replace(verifier.offered, secret=bytes(32)))
    assert "it does not take this process for the draft" in says
    assert "the other side does not know the secret" in caplog.text
    still_stands(verifier)


@pytest.mark.parametrize("count", [0, 1, 30, 31])
def test_offer_hands_nothing_to_one_who_knows_less_than_the_secret(
    verifier: Verifier, caplog: pytest.LogCaptureFixture, count: int
) -> None:
    secret = verifier.offered.secret
    with connected(verifier.offered.socket, 60.0) as peer:
        peer.sendall(secret[:count])
        if count < 31:
            peer.shutdown(socket.SHUT_WR)
        else:
            peer.sendall(bytes([secret[31] ^ 1]))
        assert socket.recv_fds(peer, 1, 8)[:2] == (b"", [])
    assert "the other side does not know the secret" in caplog.text
    still_stands(verifier)


@as_root
@linux
def test_offer_refuses_another_user_who_knows_the_secret(
    verifier: Verifier, child: Start, caplog: pytest.LogCaptureFixture
) -> None:
    process = child(OTHER_USER_ASKS, verifier.offered)
    assert said(process) == str((b"", []))
    assert f"the other side belongs to user {NOBODY}, this one to 0" in caplog.text
    still_stands(verifier)


@as_root
@linux
def test_fetch_refuses_the_offer_of_another_user(verifier: Verifier, child: Start) -> None:
    process = child(OTHER_USER_FETCHES, verifier.offered)
    assert said(process) == f"the other side belongs to user 0, this one to {NOBODY}"
    still_stands(verifier)


def test_offer_outlasts_a_silent_peer(
    verifier: Verifier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(handshake, "STEP_SECONDS", 0.05)
    with connected(verifier.offered.socket, 60.0) as peer:
        assert peer.recv(1) == b""
    assert "a hand-over of the mailbox failed: timed out" in caplog.text
    monkeypatch.undo()
    still_stands(verifier)


def nothing(peer: socket.socket, mailbox: Mailbox) -> None:
    peer.shutdown(socket.SHUT_WR)


def claims(peer: socket.socket, mailbox: Mailbox) -> None:
    peer.sendall(b"M")


def proves_another_canary(peer: socket.socket, mailbox: Mailbox) -> None:
    mailbox.format(5)
    mailbox.prove()
    peer.sendall(b"M")


def proves_and_says_something_else(peer: socket.socket, mailbox: Mailbox) -> None:
    mailbox.prove()
    peer.sendall(b"X")


@pytest.mark.parametrize(
    "does", [nothing, claims, proves_another_canary, proves_and_says_something_else]
)
def test_offer_wants_proof_of_the_memory_that_it_handed_out(
    verifier: Verifier,
    caplog: pytest.LogCaptureFixture,
    does: Callable[[socket.socket, Mailbox], None],
) -> None:
    peer, descriptor, mailbox = take(verifier.offered)
    with peer:
        does(peer, mailbox)
        assert peer.recv(1) == b""
    assert "did not prove that it maps the same memory" in caplog.text
    # Whatever a stranger keeps of it is not what the draft gets.
    os.pwrite(descriptor, b"stranger", 0)
    os.close(descriptor)
    draft = fetch(verifier.offered)
    assert draft.mailbox._memory[: len(MAGIC)] == MAGIC
    draft.close()


def test_offer_accepts_whoever_proves(verifier: Verifier) -> None:
    peer, descriptor, mailbox = take(verifier.offered)
    os.close(descriptor)
    with peer:
        mailbox.prove()
        peer.sendall(b"M")
        assert peer.recv(1) == b"A"
        verifier.claimed().close()


def test_offer_stands_when_a_draft_hangs_up_at_the_last_moment() -> None:
    gone = threading.Event()
    known: list[Doorbell] = []

    def claimed(_: int, doorbell: Doorbell) -> None:
        known.append(doorbell)
        assert gone.wait(5)

    offered = Offer(SMALL, claimed).offered
    peer, descriptor, mailbox = take(offered)
    mailbox.prove()
    peer.sendall(b"M")
    soon(lambda: len(known) == 1)
    os.close(descriptor)
    peer.close()
    gone.set()
    draft = fetch(offered)
    assert known[0].closed and len(known) == 2
    exchange(known[1], draft)
    draft.close()
    known[1].close()


# --- what is left --------------------------------------------------------------------------------


@linux
def test_offer_that_nobody_takes_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(handshake, "OFFER_SECONDS", 0.2)
    before = held()
    verifier = Verifier()
    sockets = Path("/proc/net/unix")
    assert verifier.offered.socket.startswith("@outrider-")
    assert verifier.offered.socket in sockets.read_text()
    soon(lambda: not held() - before)
    assert verifier.offered.socket not in sockets.read_text()
    assert not [one.name for one in Path("/dev/shm").iterdir() if "outrider" in one.name]
    assert "nobody fetched the mailbox that was offered" in caplog.text
    assert "can't be reached (Connection refused)" in refused(verifier.offered)


@linux
def test_mailbox_closed_by_both_leaves_nothing() -> None:
    before, mapped = held(), mappings()
    verifier = Verifier()
    draft = fetch(verifier.offered)
    verify = verifier.claimed()
    assert mappings() == mapped + 2
    draft.close()
    verify.close()
    del draft, verify
    soon(lambda: not held() - before)
    assert verifier.offered.socket not in Path("/proc/net/unix").read_text()


@linux
def test_mailbox_memory_has_no_name_and_keeps_its_size(verifier: Verifier) -> None:
    peer, descriptor, _ = take(verifier.offered)
    with peer:
        name = Path(f"/proc/self/fd/{descriptor}").readlink()
        assert str(name) == "/memfd:outrider-mailbox (deleted)"
        for size in (0, 512, 2 * SMALL.size):
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, size)
        assert os.fstat(descriptor).st_size == SMALL.size
    os.close(descriptor)


def test_offer_refuses_a_mailbox_that_is_too_large() -> None:
    before = set(threading.enumerate())
    with pytest.raises(InvalidRequest) as error:
        Offer(Layout(1024, 64, 4096), lambda *_: None)
    assert str(error.value).startswith(
        "max_sequences, max_k, row_entries: got (1024, 64, 4096); must be such that the mailbox "
        f"has at most {handshake.MOST_BYTES} bytes, not "
    )
    assert error.value.status == "INVALID_ARGUMENT"
    assert set(threading.enumerate()) <= before
