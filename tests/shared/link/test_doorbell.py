"""Ringing and waiting: the order of turns, and what becomes of a side whose other side is gone."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outrider.shared.core.errors import ProtocolError
from outrider.shared.link import doorbell
from outrider.shared.link.doorbell import (
    STALE_SECONDS,
    Doorbell,
    PeerGone,
    PeerLate,
    address_of,
    connected,
)
from outrider.shared.link.mailbox import BEATS, BELLS, ENDS, Judgement, Layout, Mailbox, VerdictHead
from outrider_testing.processes import held
from outrider_testing.waiting import soon

LAYOUT = Layout(4, 4, 4)
PATIENCE = 60.0
"""For what comes, however busy the machine is."""
Pair = tuple[Doorbell, Doorbell]
CHILD = """
import mmap, os, socket, sys
from outrider.shared.link import doorbell
from outrider.shared.link.doorbell import Doorbell
from outrider.shared.link.mailbox import Layout, Mailbox, ProposalHead
doorbell.STALE_SECONDS = 3600.0
memory, peer = (int(one) for one in sys.argv[1:])
layout = Layout(4, 4, 4)
mailbox = Mailbox(mmap.mmap(memory, layout.size), layout)
bell = Doorbell(mailbox, socket.socket(fileno=peer), "draft")
bell.ring()
while True:
    bell.wait(3600.0)
    bell.ring()
"""


def bells(**options: Any) -> Pair:
    memory = mmap.mmap(-1, LAYOUT.size)
    left, right = socket.socketpair()
    return (
        Doorbell(Mailbox(memory, LAYOUT), left, "verify", **options),
        Doorbell(Mailbox(memory, LAYOUT), right, "draft", **options),
    )


@pytest.fixture(params=[0.0, 0.002], ids=["asleep", "awake"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Both sides in this process, sleeping at once or watching the bell first."""
    made = bells(spin=request.param)
    yield made
    for one in made:
        one.close()


@pytest.fixture
def child() -> Iterator[tuple[Doorbell, subprocess.Popen[bytes]]]:
    """The verifier's side here, a draft that answers each ring in a process of its own."""
    memory = os.memfd_create("test")
    os.ftruncate(memory, LAYOUT.size)
    left, right = socket.socketpair()
    descriptors = (memory, right.fileno())
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", CHILD, *map(str, descriptors)], pass_fds=descriptors
    )
    bell = Doorbell(Mailbox(mmap.mmap(memory, LAYOUT.size), LAYOUT), left, "verify")
    os.close(memory)
    right.close()
    try:
        heard(bell)
        yield bell, process
    finally:
        process.kill()
        process.wait()
        bell.close()


def heard(bell: Doorbell) -> None:
    """Waits for a child that may still be starting: its beat does not rise yet."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            assert bell.wait(PATIENCE)
            return
        except PeerGone:
            assert time.monotonic() < end


def write(bell: Doorbell, grant: int, step: int) -> None:
    bell.mailbox.write_verdicts(VerdictHead(grant, step), [Judgement(1, 1, 0, step, step + 1, 4)])
    bell.ring()


def test_doorbell_ring_before_the_wait_is_heard(pair: Pair) -> None:
    verify, draft = pair
    verify.ring()
    assert draft.wait(PATIENCE)
    assert verify.mailbox.word(BELLS[0]) == 1


def test_doorbell_ring_wakes_one_who_waits(pair: Pair) -> None:
    verify, draft = pair
    waiting = threading.Event()
    threading.Thread(target=lambda: waiting.wait() and verify.ring()).start()
    assert draft.wait(PATIENCE, waiting.set)  # type: ignore[arg-type]
    assert verify.mailbox.word(BELLS[0]) == 1


def test_doorbell_each_side_hears_only_the_other(pair: Pair) -> None:
    verify, draft = pair
    verify.ring()
    with pytest.raises(PeerLate):
        verify.wait(0.05)
    assert draft.wait(PATIENCE)


def test_doorbell_turns_of_many_rounds_come_in_order(pair: Pair) -> None:
    verify, draft = pair
    rounds = 2000
    seen = []

    def answer() -> None:
        for step in range(rounds):
            found = draft.await_turn((1, step), draft.mailbox.read_verdicts, PATIENCE)
            assert found is not None
            seen.append(found[1][0].next_token)
            draft.ring()

    thread = threading.Thread(target=answer)
    thread.start()
    for step in range(rounds):
        write(verify, 1, step)
        assert verify.wait(PATIENCE)
    thread.join()
    assert seen == list(range(rounds))


def test_doorbell_more_rings_than_the_socket_holds_do_no_harm(pair: Pair) -> None:
    verify, draft = pair
    for _ in range(3000):
        verify.ring()
    assert verify.mailbox.word(BELLS[0]) == 3000
    write(verify, 1, 0)
    found = draft.await_turn((1, 0), draft.mailbox.read_verdicts, PATIENCE)
    assert found is not None and found[0].step == 0


def test_doorbell_wait_ends_when_interrupted(pair: Pair) -> None:
    _, draft = pair
    flag = threading.Event()
    threading.Timer(0.1, flag.set).start()
    assert not draft.wait(PATIENCE, flag.is_set)
    assert draft.await_turn((1, 0), draft.mailbox.read_verdicts, PATIENCE, lambda: True) is None


def test_doorbell_ring_comes_before_an_interruption(pair: Pair) -> None:
    verify, draft = pair
    verify.ring()
    assert draft.wait(PATIENCE, lambda: True)


def test_doorbell_peer_that_lives_and_does_not_ring_is_late(pair: Pair) -> None:
    verify, draft = pair
    began = time.monotonic()
    with pytest.raises(PeerLate, match=r"the draft did not answer in 0\.3 s"):
        verify.wait(0.3)
    assert time.monotonic() - began >= 0.3
    draft.ring()  # and is heard all the same
    assert verify.wait(PATIENCE)


def test_doorbell_rings_of_an_earlier_grant_are_passed_over(pair: Pair) -> None:
    verify, draft = pair
    for step in range(3):
        write(verify, 1, step)  # nobody listened
    thread = threading.Timer(0.1, write, (verify, 2, 0))
    thread.start()
    found = draft.await_turn((2, 0), draft.mailbox.read_verdicts, PATIENCE)
    assert found is not None and found[0] == VerdictHead(2, 0)
    thread.join()


def test_doorbell_slot_being_written_is_waited_for(pair: Pair) -> None:
    verify, draft = pair
    write(verify, 1, 0)
    verify.mailbox._memory[LAYOUT.verdicts] ^= 1  # half written when an old ring is heard
    threading.Timer(0.1, write, (verify, 1, 1)).start()
    found = draft.await_turn((1, 1), draft.mailbox.read_verdicts, PATIENCE)
    assert found is not None and found[0].step == 1


@pytest.mark.parametrize("there", [(1, 6), (2, 0)])
def test_doorbell_turn_that_is_yet_to_come_breaks_the_protocol(
    pair: Pair, there: tuple[int, int]
) -> None:
    verify, draft = pair
    write(verify, *there)
    with pytest.raises(ProtocolError, match=r"while \(1, 5\) was waited for"):
        draft.await_turn((1, 5), draft.mailbox.read_verdicts, PATIENCE)


def test_doorbell_peer_that_left_in_a_later_turn_of_the_grant_is_heard(pair: Pair) -> None:
    verify, draft = pair
    write(verify, 1, 5)
    # It did not wait for the draft, and its word is in the place of what the draft waits for.
    verify.mailbox.write_verdicts(VerdictHead(1, 6, ENDS), ())
    verify.ring()
    found = draft.await_turn((1, 5), draft.mailbox.read_verdicts, PATIENCE)
    assert found == (VerdictHead(1, 6, ENDS), [])
    assert not draft.closed
    verify.mailbox.write_verdicts(VerdictHead(2, 0, ENDS), ())  # which no grant before it ends
    verify.ring()
    with pytest.raises(ProtocolError):
        draft.await_turn((1, 5), draft.mailbox.read_verdicts, PATIENCE)


def test_doorbell_peer_that_let_go_is_told_at_once(pair: Pair) -> None:
    verify, draft = pair
    verify.ring()
    assert draft.alive()
    verify.close()
    assert not draft.alive()  # though a ring is yet to be heard
    assert draft.wait(PATIENCE)  # what it said before still counts
    assert not draft.alive()
    with pytest.raises(PeerGone, match="the verifier has let go of the mailbox"):
        draft.wait(PATIENCE)
    with pytest.raises(PeerGone):
        for _ in range(2):
            draft.ring()


def test_doorbell_close_wakes_the_own_waiter(pair: Pair) -> None:
    verify, _ = pair
    waiting = threading.Event()
    ends: list[BaseException] = []

    def wait() -> None:
        try:
            verify.wait(PATIENCE, waiting.set)  # type: ignore[arg-type]
        except PeerGone as error:
            ends.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    assert waiting.wait(PATIENCE)
    verify.close()
    thread.join(PATIENCE)
    assert len(ends) == 1 and not isinstance(ends[0], PeerLate)
    assert verify.closed and not verify.alive()


def test_doorbell_close_from_many_threads_closes_once(pair: Pair) -> None:
    verify, draft = pair
    threads = [threading.Thread(target=verify.close) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    with pytest.raises(PeerGone):
        draft.wait(PATIENCE)


def test_doorbell_closed_leaves_no_thread_and_no_descriptor() -> None:
    before = held()
    for _ in range(20):
        verify, draft = bells()
        verify.ring()
        assert draft.wait(PATIENCE)
        verify.close()
        draft.close()
    assert not held() - before


def test_doorbell_beat_of_a_living_side_rises(pair: Pair) -> None:
    verify, draft = pair
    for index, one in enumerate((verify, draft)):
        first = one.mailbox.word(BEATS[index])
        soon(lambda word=one.mailbox.word, at=BEATS[index], first=first: word(at) > first)  # type: ignore[misc]


def test_doorbell_peer_killed_is_noticed_at_once(
    child: tuple[Doorbell, subprocess.Popen[bytes]],
) -> None:
    bell, process = child
    for _ in range(50):
        bell.ring()
        assert bell.wait(PATIENCE)
    threading.Timer(0.1, process.send_signal, (signal.SIGKILL,)).start()
    # The kernel tells: neither its beat nor the patience has to run out.
    with pytest.raises(PeerGone, match="let go") as error:
        bell.wait(PATIENCE)
    assert not isinstance(error.value, PeerLate)
    assert not bell.alive()


def test_doorbell_peer_that_stands_still_is_noticed_and_survived(
    child: tuple[Doorbell, subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bell, process = child
    bell.ring()
    assert bell.wait(PATIENCE)
    monkeypatch.setattr(doorbell, "STALE_SECONDS", STALE_SECONDS)
    process.send_signal(signal.SIGSTOP)
    bell.ring()
    began = time.monotonic()
    with pytest.raises(PeerGone, match="the draft stands still") as error:
        bell.wait(PATIENCE)
    assert not isinstance(error.value, PeerLate)
    assert STALE_SECONDS < time.monotonic() - began < PATIENCE / 2
    monkeypatch.setattr(doorbell, "STALE_SECONDS", PATIENCE)
    # It was only asleep, and the mailbox is as good as before.
    process.send_signal(signal.SIGCONT)
    assert bell.wait(PATIENCE)
    bell.ring()
    assert bell.wait(PATIENCE)


def test_doorbell_peer_late_comes_before_standing_still(
    child: tuple[Doorbell, subprocess.Popen[bytes]],
) -> None:
    bell, process = child
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(PeerLate):
        bell.wait(0.4)
    process.send_signal(signal.SIGCONT)


def test_doorbell_connection_reaches_abstract_and_plain_sockets(short_folder: Path) -> None:
    for path in (f"@outrider-test-{os.getpid()}", str(short_folder / "s")):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address_of(path))
            listener.listen(1)
            connected(path, 1.0).close()
    with pytest.raises(OSError, match="No such file"):
        connected(str(short_folder / "nobody"), 1.0)
