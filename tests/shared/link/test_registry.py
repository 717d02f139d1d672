"""The mailboxes of a service: who may have one, how many there are, and when they are gone."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pytest
import torch

from outrider.protos import speculation_pb2 as pb
from outrider.shared.core.errors import CapacityError, InvalidRequest
from outrider.shared.core.types import Proposal
from outrider.shared.link import handshake, registry
from outrider.shared.link.device.handshake import DeviceSide
from outrider.shared.link.doorbell import Doorbell, PeerGone
from outrider.shared.link.handshake import HandoverFailed
from outrider.shared.link.mailbox import Judgement, Layout, ProposalHead, VerdictHead
from outrider.shared.link.registry import Mailboxes
from outrider_testing import host_device

SIZES = pb.OfferMailboxRequest(max_sequences=2, max_k=3, row_entries=4, link="shm")
UNIX = "unix:"  # what gRPC calls a caller over a unix socket


class Services:
    """A verifier's mailboxes and a draft's."""

    def __init__(self) -> None:
        self.verify, self.draft = Mailboxes(), Mailboxes()

    def introduce(self) -> int:
        offer = self.verify.offer(SIZES, UNIX)
        self.draft.map(pb.MapMailboxRequest(offer=offer), UNIX)
        return int(offer.mailbox)

    def both(self, mailbox: int) -> tuple[Doorbell, Doorbell]:
        verify, draft = self.verify.get(mailbox), self.draft.get(mailbox)
        assert verify is not None and draft is not None
        return verify, draft


@pytest.fixture
def services() -> Iterator[Services]:
    made = Services()
    yield made
    for doorbell in (*made.verify._open.values(), *made.draft._open.values()):
        doorbell.close()


class DeviceServices(Services):
    """With device memory to share, and preparations that last until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        memory = host_device.HostMemory()
        self.go = {"verify": threading.Event(), "draft": threading.Event()}
        for name, mailboxes in (("verify", self.verify), ("draft", self.draft)):
            mailboxes.device = DeviceSide(torch.device("cpu"), memory)
            mailboxes.prepare = lambda doorbell, name=name: self.go[name].wait(60)


def beats() -> int:
    """Doorbells that are not closed: each has a thread."""
    return sum(one.name == "mailbox beat" for one in threading.enumerate())


def test_mailboxes_offered_and_mapped_are_connected(services: Services) -> None:
    verify, draft = services.both(services.introduce())
    assert verify.mailbox.layout == draft.mailbox.layout == Layout(2, 3, 4)
    judged = [Judgement(1, 1, 2, 9, 43, 3)]
    verify.mailbox.write_verdicts(VerdictHead(7, 0), judged)
    verify.ring()
    heard = draft.await_turn((7, 0), draft.mailbox.read_verdicts, 60.0)
    assert heard == (VerdictHead(7, 0), judged)
    proposed = [Proposal(1, 1, 43, (5, 6, 7), ())]
    draft.mailbox.write_proposals(ProposalHead(7, 1), proposed)
    draft.ring()
    told = verify.await_turn((7, 1), verify.mailbox.read_proposals, 60.0)
    assert told == (ProposalHead(7, 1), proposed)


def test_mailboxes_are_known_to_both_as_soon_as_one_is_mapped(services: Services) -> None:
    # A grant may come at once, and is refused for a mailbox that is not there.
    for _ in range(10):
        services.both(services.introduce())


def test_mailboxes_have_names_of_their_own(services: Services) -> None:
    first, second = services.introduce(), services.introduce()
    assert first != second
    one, other = services.both(first), services.both(second)
    assert one[0] is not other[0] and one[1] is not other[1]
    one[0].mailbox.set_word(320, 5)
    assert (one[1].mailbox.word(320), other[1].mailbox.word(320)) == (5, 0)


def test_mailboxes_unknown_is_none(services: Services) -> None:
    mailbox = services.introduce()
    for unknown in (0, mailbox + 1):
        assert services.verify.get(unknown) is None
        assert services.draft.get(unknown) is None


def test_mailboxes_only_offered_are_not_open(services: Services) -> None:
    offer = services.verify.offer(SIZES, UNIX)
    assert services.verify.get(offer.mailbox) is None
    assert len(services.verify) == 0
    services.draft.map(pb.MapMailboxRequest(offer=offer), UNIX)
    assert len(services.verify) == len(services.draft) == 1


@pytest.mark.parametrize("caller", ["ipv4:10.1.2.3:5005", "ipv6:%5B::1%5D:5005", "", "unknown"])
def test_mailboxes_refuse_a_caller_from_the_network(services: Services, caller: str) -> None:
    says = f"over unix sockets only; this call came from {caller}"
    before = set(threading.enumerate())
    with pytest.raises(HandoverFailed) as error:
        services.verify.offer(SIZES, caller)
    assert says in str(error.value)
    assert set(threading.enumerate()) <= before  # nothing waits for anybody
    offer = services.verify.offer(SIZES, UNIX)
    with pytest.raises(HandoverFailed) as error:
        services.draft.map(pb.MapMailboxRequest(offer=offer), caller)
    assert says in str(error.value)
    assert len(services.draft) == 0
    services.draft.map(pb.MapMailboxRequest(offer=offer), UNIX)


@pytest.mark.parametrize("side", ["verify", "draft"])
def test_mailboxes_closed_by_one_side_are_gone_for_the_other(services: Services, side: str) -> None:
    mailbox = services.introduce()
    verify, draft = services.both(mailbox)
    closing, left = (verify, draft) if side == "verify" else (draft, verify)
    closing.close()
    assert services.verify.get(mailbox) is None
    assert services.draft.get(mailbox) is None
    with pytest.raises(PeerGone):
        left.wait(60.0)
    # Counting lets go of it on the other side too, with its thread.
    assert len(services.verify) == len(services.draft) == 0
    assert left.closed


@pytest.mark.parametrize("full", ["verify", "draft"])
def test_mailboxes_have_a_limit_and_those_that_are_gone_make_room(
    services: Services, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    monkeypatch.setattr(registry, "MOST_MAILBOXES", 3)
    open_ones = [services.introduce() for _ in range(3)]
    beating = beats()
    says = r"3 mailboxes are open or offered \(at most 3\)"
    other = Services()
    if full == "verify":
        with pytest.raises(CapacityError, match=says):
            services.verify.offer(SIZES, UNIX)
    else:
        offer = other.verify.offer(SIZES, UNIX)
        with pytest.raises(CapacityError, match=says):
            services.draft.map(pb.MapMailboxRequest(offer=offer), UNIX)
        other.draft.map(pb.MapMailboxRequest(offer=offer), UNIX)
        for doorbell in other.both(offer.mailbox):
            doorbell.close()
    for doorbell in services.both(open_ones[1]):
        doorbell.close()
    services.both(services.introduce())
    assert beats() == beating
    for mailbox in (open_ones[0], open_ones[2]):
        services.both(mailbox)  # the others are as they were


def test_mailboxes_full_let_go_of_the_one_that_was_idle_longest(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "MOST_MAILBOXES", 2)
    first, second = services.introduce(), services.introduce()
    for side in (services.verify, services.draft):
        with side.used(first):  # as a grant does that names it
            pass
    with pytest.raises(CapacityError):
        services.introduce()
    monkeypatch.setattr(registry, "IDLE_SECONDS", 0.0)
    third = services.introduce()
    assert services.verify.get(second) is None and services.draft.get(second) is None
    for mailbox in (first, third):
        services.both(mailbox)


def test_mailboxes_full_keep_those_that_a_grant_uses(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "MOST_MAILBOXES", 1)
    monkeypatch.setattr(registry, "IDLE_SECONDS", 0.0)
    only = services.introduce()
    with services.verify.used(only) as doorbell:
        assert doorbell is not None
        with pytest.raises(CapacityError):
            services.verify.offer(SIZES, UNIX)
    services.both(only)


def test_mailboxes_count_offers_that_nobody_has_fetched(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "MOST_MAILBOXES", 2)
    services.verify.offer(SIZES, UNIX)
    services.verify.offer(SIZES, UNIX)
    with pytest.raises(CapacityError, match="2 mailboxes are open or offered"):
        services.verify.offer(SIZES, UNIX)
    monkeypatch.setattr(registry, "OFFER_SECONDS", 0.0)
    services.verify.offer(SIZES, UNIX)


@pytest.mark.parametrize("side", ["verify", "draft"])
def test_mailboxes_close_lets_go_of_those_that_are_named(services: Services, side: str) -> None:
    first, second, third = (services.introduce() for _ in range(3))
    beating = beats()
    named = services.verify if side == "verify" else services.draft
    named.close([])
    named.close([second, 0, second, third])
    for gone in (second, third):
        assert services.verify.get(gone) is None and services.draft.get(gone) is None
    services.both(first)
    assert len(services.verify) == len(services.draft) == 1
    assert beats() == beating - 4
    named.close([second])  # once more does no harm


def test_mailboxes_refuse_sizes_out_of_range(services: Services) -> None:
    before = set(threading.enumerate())
    with pytest.raises(InvalidRequest, match=r"max_k: got 65; must be in 1\.\.64"):
        request = pb.OfferMailboxRequest(max_sequences=1, max_k=65, row_entries=1)
        services.verify.offer(request, UNIX)
    with pytest.raises(InvalidRequest, match="max_sequences, max_k, row_entries: got"):
        request = pb.OfferMailboxRequest(max_sequences=1024, max_k=64, row_entries=4096, link="shm")
        services.verify.offer(request, UNIX)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("link", ["", "grpc", "pigeons"])
def test_mailboxes_refuse_a_link_that_has_none(services: Services, link: str) -> None:
    request = pb.OfferMailboxRequest(max_sequences=2, max_k=3, row_entries=4, link=link)
    with pytest.raises(InvalidRequest, match=f"link: got '{link}'; must be one of shm, cuda-ipc"):
        services.verify.offer(request, UNIX)
    offer = services.verify.offer(SIZES, UNIX)
    wrong = pb.OfferMailboxResponse()
    wrong.CopyFrom(offer)
    wrong.link = link
    with pytest.raises(InvalidRequest, match="must be one of"):
        services.draft.map(pb.MapMailboxRequest(offer=wrong), UNIX)
    services.draft.map(pb.MapMailboxRequest(offer=offer), UNIX)


def test_mailboxes_that_can_not_be_mapped_are_not_open(services: Services) -> None:
    offer = services.verify.offer(SIZES, UNIX)
    wrong = pb.OfferMailboxResponse()
    wrong.CopyFrom(offer)
    wrong.boot_id = "elsewhere"
    with pytest.raises(HandoverFailed, match="do not run on one host"):
        services.draft.map(pb.MapMailboxRequest(offer=wrong), UNIX)
    assert len(services.verify) == len(services.draft) == 0
    services.draft.map(pb.MapMailboxRequest(offer=offer), UNIX)
    services.both(offer.mailbox)


def test_mailboxes_watch_the_bell_as_long_as_they_are_told(services: Services) -> None:
    services.verify.spin, services.draft.spin = 0.25, 0.5
    verify, draft = services.both(services.introduce())
    assert (verify._spin, draft._spin) == (0.25, 0.5)


@pytest.mark.parametrize("last", ["verify", "draft"])
def test_mailboxes_are_mapped_once_both_sides_have_prepared(
    monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    # Preparing may take longer than either side waits for the other's word in the hand-over.
    monkeypatch.setattr(handshake, "STEP_SECONDS", 0.2)
    monkeypatch.setattr(registry, "PREPARE_SECONDS", 60.0)
    services = DeviceServices()
    offer = services.verify.offer(
        pb.OfferMailboxRequest(max_sequences=2, max_k=3, row_entries=4, link="cuda-ipc"), UNIX
    )
    answers: queue.Queue[pb.MapMailboxResponse] = queue.Queue()
    request = pb.MapMailboxRequest(offer=offer)
    asking = threading.Thread(target=lambda: answers.put(services.draft.map(request, UNIX)))
    asking.start()
    first = "draft" if last == "verify" else "verify"
    services.go[first].set()
    with pytest.raises(queue.Empty):
        answers.get(timeout=0.5)
    for doorbell in services.both(offer.mailbox):
        assert not doorbell.await_prepared(0.01)
    services.go[last].set()
    assert answers.get(timeout=60).link == "cuda-ipc"
    asking.join(60)
    for doorbell in services.both(offer.mailbox):
        assert doorbell.await_prepared(0.0)
        doorbell.close()


def test_mailboxes_whose_preparation_fails_are_mapped() -> None:
    services = DeviceServices()

    def fails(doorbell: Doorbell) -> None:
        raise RuntimeError("no memory")

    services.verify.prepare = services.draft.prepare = fails
    request = pb.OfferMailboxRequest(max_sequences=2, max_k=3, row_entries=4, link="cuda-ipc")
    offer = services.verify.offer(request, UNIX)
    assert services.draft.map(pb.MapMailboxRequest(offer=offer), UNIX).link == "cuda-ipc"
    for doorbell in services.both(offer.mailbox):
        assert doorbell.await_prepared(60.0)
        doorbell.close()
