"""Rounds that run by themselves when something breaks: the tokens stay, and the link comes back."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc
import pytest

from outrider.coordinator.server.runtime import Runtime
from outrider.coordinator.telemetry.records import NoObserver
from outrider.protos import speculation_pb2 as pb
from outrider.protos import speculation_pb2_grpc as stubs
from outrider.shared.core import wire
from outrider.shared.core.errors import ConfigError, RefusalCode
from outrider.shared.core.types import Decoding, OpenSequence, ProposeItem, Refusal, VerifyItem
from outrider.shared.link import registry
from outrider_testing import fakes
from outrider_testing.clients import ask
from outrider_testing.waiting import soon, until

Make = Callable[..., Any]
PROMPT = [5, 6, 7, 8]
SIZES = pb.OfferMailboxRequest(max_sequences=4, max_k=8, row_entries=8, link="shm")


class Inside(NoObserver):
    """Keeps the coordinator at hand."""

    runtime: Runtime

    def attach(self, runtime: Any) -> None:
        self.runtime = runtime

    @property
    def mailbox(self) -> int:
        return int(self.runtime.mailbox_setup.mailbox)


async def resumed(client: Any, request: Any, base: Any, draft: Any) -> None:
    """The services share a mailbox again, and use it."""
    async with asyncio.timeout(10):
        while (info := await client.info()).link != "shm":
            await asyncio.sleep(0.01)
    assert info.link_reason == ""
    before = len(base.free), len(draft.free)
    assert (await client.generate(request)).only.ids == fakes.plain(PROMPT, 40)
    await until(lambda: len(draft.free) > before[1] + 3)
    assert any(item.proposal for _, items in base.free[before[0] :] for item in items)


# --- services that break ---------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["draft", "verify"])
async def test_granted_rounds_service_killed_in_a_grant_changes_no_token(
    services: Make, client_of: Make, victim: str
) -> None:
    base = services("verify", seconds_per_round=0.002)
    draft = services("draft", agreement=90)
    one = draft if victim == "draft" else base
    inside = Inside()

    async with client_of(base, draft, inside, link="shm") as client:
        first = inside.mailbox
        call = asyncio.create_task(client.generate(ask(PROMPT, 400, k=3)))
        await until(lambda: len(draft.free) > 5 and len(base.free) > 5)
        await asyncio.to_thread(one.kill)
        await until(lambda: not inside.mailbox)
        if victim == "draft":
            info = await client.info()
            assert (info.link, info.link_reason) == ("grpc", "a service was lost")
            rounds = base.toy.rounds
            await until(lambda: base.toy.rounds > rounds + 5)  # it goes on without
        one.start()
        assert (await call).only.ids == fakes.plain(PROMPT, 400)
        await resumed(client, ask(PROMPT, 40, k=3), base, draft)
        assert inside.mailbox not in (0, first)
        await until(lambda: base.toy.live == draft.toy.live == 0)


async def test_granted_rounds_draft_that_is_late_is_gone_without_and_keeps_the_mailbox(
    services: Make, client_of: Make
) -> None:
    base, draft = services("verify", seconds_per_round=0.001), services("draft", agreement=90)
    inside = Inside()

    settings = {"link": "shm", "draft_patience_seconds": 0.2}
    async with client_of(base, draft, inside, **settings) as client:
        first = inside.mailbox
        call = asyncio.create_task(client.generate(ask(PROMPT, 300, k=3)))
        await until(lambda: len(draft.free) > 5)
        gate = draft.toy.stand()
        await until(gate.reached.is_set)
        # The base goes on by itself, which takes no mailbox.
        assert (await call).only.ids == fakes.plain(PROMPT, 300)
        assert not any(item.proposal for item in base.free[-1][1])
        info = await client.info()
        assert (info.link, inside.mailbox) == ("shm", first)
        draft.toy.hold = None
        gate.set()
        # What it had to say comes late, and it is of use again.
        await until(lambda: draft.toy.live == 0)
        await resumed(client, ask(PROMPT, 40, k=3), base, draft)
        assert inside.mailbox == first


@pytest.mark.parametrize("victim", ["draft", "verify"])
async def test_granted_rounds_service_that_hangs_in_a_grant_is_given_up(
    services: Make, client_of: Make, victim: str
) -> None:
    base, draft = services("verify", seconds_per_round=0.001), services("draft", agreement=90)
    toy = draft.toy if victim == "draft" else base.toy
    inside = Inside()

    settings = {"link": "shm", "draft_patience_seconds": 0.1, f"{victim}_timeout_seconds": 0.3}
    async with client_of(base, draft, inside, **settings) as client:
        first = inside.mailbox
        call = asyncio.create_task(client.generate(ask(PROMPT, 300, k=3)))
        await until(lambda: len(draft.free) > 5)
        gate = toy.stand()
        await until(gate.reached.is_set)
        await until(lambda: inside.mailbox != first)
        if victim == "verify":
            # Nobody waits with it: the draft is told, and says so.
            draft_connection = inside.runtime.draft_connection
            assert draft_connection is not None
            await until(lambda: draft_connection.up and not draft_connection.waiting)
        toy.hold = None
        gate.set()
        assert (await call).only.ids == fakes.plain(PROMPT, 300)
        await resumed(client, ask(PROMPT, 40, k=3), base, draft)
        assert inside.mailbox not in (0, first)
        await until(lambda: base.toy.live == draft.toy.live == 0)


@pytest.mark.parametrize(
    "code", [RefusalCode.UNKNOWN, RefusalCode.STALE_EPOCH, RefusalCode.KV_MISSING]
)
@pytest.mark.parametrize("role", ["draft", "verify"])
async def test_granted_rounds_goes_on_after_a_refusal(
    services: Make, client_of: Make, role: str, code: RefusalCode
) -> None:
    both = {"verify": services("verify"), "draft": services("draft", agreement=90)}
    base, draft = both["verify"], both["draft"]
    refused: list[int] = []
    inside = Inside()

    def refuse(item: Any) -> Refusal | None:
        if len(both[role].free) < 4 or refused:
            return None
        refused.append(len(draft.free))
        return Refusal(item.sequence_id, item.epoch, code, "made up", min(item.base_len, 2))

    both[role].toy.refuse = refuse

    async with client_of(base, draft, inside, link="shm") as client:
        first = inside.mailbox
        one = (await client.generate(ask(PROMPT, 150, k=3))).only
        assert one.ids == fakes.plain(PROMPT, 150)
        # Though one service may have been given the sequence anew, and the other not.
        assert len(draft.free) > refused[0] + 10
        assert inside.mailbox == first
    assert base.toy.live == draft.toy.live == 0


async def test_granted_rounds_mailbox_that_nobody_knows_is_replaced(
    services: Make, client_of: Make, caplog: pytest.LogCaptureFixture
) -> None:
    base, draft = services("verify"), services("draft", agreement=90)
    inside = Inside()

    async with client_of(base, draft, inside, link="shm") as client:
        inside.runtime.mailbox_setup.mailbox = 77
        assert (await client.generate(ask(PROMPT, 40, k=3))).only.ids == fakes.plain(PROMPT, 40)
        info = await client.info()
        assert (info.link, info.link_reason) == ("grpc", "mailbox 77 is not mapped here")
        assert not draft.free
        await resumed(client, ask(PROMPT, 40, k=3), base, draft)
    assert "lost their mailbox: mailbox 77 is not mapped here" in caplog.text


async def test_granted_rounds_coordinators_that_come_and_go_leave_no_mailbox(
    services: Make, client_of: Make
) -> None:
    base, draft = services("verify"), services("draft", agreement=90)
    threads = threading.active_count()

    for _ in range(18):  # more than a service holds at a time
        async with client_of(base, draft, link="shm") as client:
            assert (await client.generate(ask(PROMPT, 9, k=1))).only.ids == fakes.plain(PROMPT, 9)
    assert len(draft.free) >= 18
    # Each side of a mailbox has a thread.
    assert threading.active_count() - threads < 36


async def test_granted_rounds_coordinators_without_a_request_make_room_in_time(
    services: Make, client_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "MOST_MAILBOXES", 3)
    base, draft = services("verify"), services("draft")

    for _ in range(3):
        async with client_of(base, draft, link="shm"):
            pass
    # No grant ever named them, so no stream took them along when it ended.
    with pytest.raises(ConfigError, match=r"3 mailboxes are open or offered \(at most 3\)"):
        await client_of(base, draft, link="shm").__aenter__()
    monkeypatch.setattr(registry, "IDLE_SECONDS", 0.0)
    for _ in range(4):
        async with client_of(base, draft, link="shm") as client:
            assert (await client.info()).link == "shm"


# --- where there is no shared memory ---------------------------------------------------------


@pytest.fixture
def over_tcp(tmp_path: Path) -> Iterator[Make]:
    """``over_tcp("draft")``: a toy service on a port of its own."""
    made: list[Any] = []

    def start(role: str) -> Any:
        one = fakes.ToyService(role, "127.0.0.1:0", fakes.Toy(model=str(tmp_path)))
        made.append(one)
        assert one._server is not None
        one.listen = str(one._server.address)
        return one

    yield start
    for one in made:
        one.kill()


@pytest.mark.parametrize("far", ["verify", "draft"])
async def test_granted_rounds_link_over_tcp_is_grpc_and_says_why(
    services: Make, over_tcp: Make, client_of: Make, far: str
) -> None:
    base = (over_tcp if far == "verify" else services)("verify")
    draft = (over_tcp if far == "draft" else services)("draft")
    address = base.listen if far == "verify" else draft.listen
    why = f"the {far} service is reached at {address}, not over a unix socket"

    with pytest.raises(ConfigError) as error:
        await client_of(base, draft, link="shm").__aenter__()
    assert str(error.value).startswith(f"link = 'shm' can't be had: {why}")
    for link, reason in (("auto", why), ("grpc", "")):
        async with client_of(base, draft, link=link) as client:
            for k in (0, 3):
                one = (await client.generate(ask(PROMPT, 40, k=k))).only
                assert one.ids == fakes.plain(PROMPT, 40)
            assert one.finished.speculation.accepted > 0
            info = await client.info()
            assert info.link == "grpc"
            assert info.link_reason.startswith(reason) and bool(info.link_reason) == bool(reason)
    # Plain decoding needs no draft, and so no mailbox.
    assert base.free and not draft.free


async def test_granted_rounds_link_is_made_when_the_draft_comes_later(
    services: Make, client_of: Make
) -> None:
    base, draft = services("verify"), services("draft", agreement=90)
    draft.kill()

    async with client_of(base, draft, link="shm", draft_start_seconds=0.1) as client:
        assert (await client.info()).link == "grpc"
        assert (await client.generate(ask(PROMPT, 40, k=3))).only.ids == fakes.plain(PROMPT, 40)
        draft.start()
        await resumed(client, ask(PROMPT, 40, k=3), base, draft)


def test_mailbox_calls_over_tcp_are_refused(over_tcp: Make) -> None:
    base, draft = over_tcp("verify"), over_tcp("draft")
    for service, method, stub, request in (
        (base, "OfferMailbox", stubs.VerifyStub, SIZES),
        (draft, "MapMailbox", stubs.DraftStub, pb.MapMailboxRequest()),
    ):
        with (
            grpc.insecure_channel(service.listen) as channel,
            pytest.raises(grpc.RpcError) as error,
        ):
            getattr(stub(channel), method)(request, timeout=60)
        assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert error.value.details().startswith(
            "mailboxes are arranged over unix sockets only; this call came from ipv4:127.0.0.1:"
        )


def test_mailbox_that_is_too_large_is_refused(services: Make) -> None:
    base = services("verify")
    with grpc.insecure_channel(base.listen) as channel, pytest.raises(grpc.RpcError) as error:
        stubs.VerifyStub(channel).OfferMailbox(
            pb.OfferMailboxRequest(max_sequences=1024, max_k=64, row_entries=4096, link=SIZES.link),
            timeout=60,
        )
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.value.details().startswith(
        "max_sequences, max_k, row_entries: got (1024, 64, 4096); must be such that"
    )


# --- grants, message by message --------------------------------------------------------------


class Stream:
    """One coordinator's stream to one service."""

    def __init__(self, service: Any) -> None:
        self.draft = service.role == "draft"
        self.channel = grpc.insecure_channel(service.listen)
        self.stub: Any = (stubs.DraftStub if self.draft else stubs.VerifyStub)(self.channel)
        self._sent: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.call = self.stub.Rounds(iter(self._sent.get, None), timeout=120)
        self._number = 0

    def send(self, items: Any = (), open: Any = (), **parts: Any) -> None:
        self._number += 1
        kind: Any = pb.DraftRequest if self.draft else pb.VerifyRequest
        message = kind(
            round=self._number,
            items=[asdict(item) for item in items],
            open=[wire.write_open(one) for one in open],
            **parts,
        )
        self._sent.put(message)

    def change(self, **parts: Any) -> None:
        kind: Any = pb.DraftRequest if self.draft else pb.VerifyRequest
        self._sent.put(kind(change=pb.GrantChange(**parts)))

    def read(self) -> Any:
        return next(self.call)

    def reports(self) -> list[Any]:
        """The answers to a grant, the last of which has its end."""
        found = [self.read()]
        while not found[-1].HasField("grant_end"):
            found.append(self.read())
        return found

    def close(self) -> None:
        self.call.cancel()
        self._sent.put(None)
        self.channel.close()


class Peers:
    """Both services with one sequence and one mailbox, and nobody but the test to talk to them."""

    def __init__(self, base: Any, draft: Any) -> None:
        self.base, self.draft = base, draft
        self.verify, self.propose = Stream(base), Stream(draft)
        offer = self.verify.stub.OfferMailbox(SIZES, timeout=60)
        self.propose.stub.MapMailbox(pb.MapMailboxRequest(offer=offer), timeout=60)
        self.mailbox = offer.mailbox
        for one in (self.verify, self.propose):
            one.send(open=[OpenSequence(1, 2, 500, Decoding(prompt_len=len(PROMPT)))])
            one.read()

    def grant(
        self,
        *,
        k: int = 3,
        limit: int = 400,
        stops: tuple[int, ...] = (),
        epochs: tuple[int, int] = (2, 2),
        draft_log: list[int] = PROMPT,
        **parts: Any,
    ) -> None:
        """``epochs``: of the sequence as the verifier is told, and the draft."""
        settings: dict[str, Any] = {
            "id": 1, "mailbox": self.mailbox, "rounds": 1000, "patience_seconds": 10.0,
            "link": SIZES.link,
        } | parts  # fmt: skip
        items: list[Any] = [ProposeItem(1, epochs[1], 0, tuple(draft_log), k)]
        self.propose.send(items, grant=pb.Grant(**settings))
        granted = pb.GrantedSequence(k=k, limit=limit, stop_token_ids=stops)
        items = [VerifyItem(1, epochs[0], 0, tuple(PROMPT))]
        self.verify.send(items, grant=pb.Grant(**settings, sequences=[granted]))

    def ends(self) -> tuple[Any, Any]:
        """The ends of the grant, as the verifier and the draft say it."""
        return self.verify.reports()[-1].grant_end, self.propose.reports()[-1].grant_end

    def close(self) -> None:
        self.verify.close()
        self.propose.close()


@pytest.fixture
def peers(services: Make) -> Iterator[Peers]:
    """See ``Peers``; the draft is right most of the time."""
    made = Peers(services("verify"), services("draft", agreement=80))
    yield made
    made.close()


def stand(service: Any) -> Any:
    """Has ``service`` stand in its next round."""
    gate = service.toy.stand()
    assert gate.reached.wait(60)
    return gate


def go_on(service: Any, gate: Any) -> None:
    """Has ``service`` go on with the round in which it stands."""
    service.toy.hold = None
    gate.set()


def listening() -> int:
    """The threads that hear what comes while a grant runs: one less for each that has ended it."""
    return sum(one.name == "grant control" for one in threading.enumerate())


def test_grant_ends_for_both_at_the_limit(peers: Peers) -> None:
    peers.grant(limit=len(PROMPT) + 30)
    reports = peers.verify.reports()
    ids: list[int] = []
    for step, report in enumerate(reports):
        (verdict,), (proposal,) = report.verdicts, report.granted.proposals
        assert report.granted.step == step
        assert proposal.committed_len == len(PROMPT) + len(ids)
        ids += [*proposal.tokens[: verdict.num_accepted], verdict.next_token]
        assert verdict.committed_len == len(PROMPT) + len(ids)
    # No proposal reached beyond it, so not one token is too many.
    assert ids == fakes.plain(PROMPT, 30)
    (answer,) = peers.propose.reports()
    for end in (reports[-1].grant_end, answer.grant_end):
        assert end.reason == pb.GRANT_END_REASON_STOPPED
        assert end.rounds == len(reports)


def test_grant_ends_for_both_with_the_round_that_has_a_stop_token(peers: Peers) -> None:
    ids = fakes.plain(PROMPT, 16)
    assert len(set(ids)) == len(ids)
    places = set()
    for at in range(2, 12):
        peers.grant(id=at, stops=(299, ids[at]))
        reports = peers.verify.reports()
        answer = peers.propose.reports()[-1].grant_end
        assert reports[-1].grant_end.reason == answer.reason == pb.GRANT_END_REASON_STOPPED
        lengths = [len(PROMPT), *(report.verdicts[0].committed_len for report in reports)]
        assert lengths[-2] <= len(PROMPT) + at < lengths[-1]
        assert answer.rounds == len(reports)
        places.add(reports[-1].verdicts[0].next_token == ids[at])
    # As the base's own token, and among those that were proposed.
    assert places == {True, False}


def test_grant_ends_for_both_when_its_rounds_are_run(peers: Peers) -> None:
    peers.grant(rounds=3)
    assert len(reports := peers.verify.reports()) == 3
    assert reports[-1].grant_end.reason == pb.GRANT_END_REASON_CREDITS
    # The draft is only told that this is all.
    assert peers.propose.reports()[-1].grant_end.rounds == 3
    assert (peers.base.toy.rounds, peers.draft.toy.rounds) == (3, 3)


def test_grant_change_of_k_reaches_the_draft_with_the_next_round(peers: Peers) -> None:
    peers.grant(k=5, rounds=500)
    soon(lambda: len(peers.draft.free) > 3)
    gate = stand(peers.base)
    before = peers.draft.toy.rounds
    peers.verify.change(id=1, rounds=6, ks=[2])
    # A change without Ks leaves them, also those that are still on their way.
    peers.verify.change(id=1, rounds=5)
    # Not this grant's.
    peers.verify.change(id=9, rounds=1, ks=[1])
    soon(lambda: len(peers.base.changes) == 3)
    go_on(peers.base, gate)
    verify, draft = peers.ends()
    assert [item.k for item in peers.draft.toy.items] == [5] * before + [2] * 5
    # The round that stood is the last of those granted before.
    assert verify.reason == pb.GRANT_END_REASON_CREDITS
    assert verify.rounds == draft.rounds == before + 5


@pytest.mark.parametrize("standing", ["verify", "draft"])
def test_grant_ends_for_a_message_which_is_then_answered(peers: Peers, standing: str) -> None:
    peers.grant()
    soon(lambda: len(peers.draft.free) > 3)
    service = peers.base if standing == "verify" else peers.draft
    gate = stand(service)
    before = peers.base.toy.rounds
    assert listening() == 2
    peers.verify.send(close=[1])
    soon(lambda: listening() == 1)
    go_on(service, gate)
    verify, draft = peers.ends()
    assert verify.reason == pb.GRANT_END_REASON_REVOKED
    assert draft.reason == pb.GRANT_END_REASON_STOPPED
    assert verify.rounds == before + 1
    answer = peers.verify.read()
    assert answer.round == 3 and not answer.HasField("grant_end")
    assert (peers.base.toy.live, peers.draft.toy.live) == (0, 1)


def test_grant_of_a_draft_that_is_late_ends_for_both_and_the_mailbox_stays(peers: Peers) -> None:
    peers.grant(patience_seconds=1.0)
    soon(lambda: len(peers.draft.free) > 3)
    gate = stand(peers.draft)
    last = peers.verify.reports()[-1]
    assert last.grant_end.reason == pb.GRANT_END_REASON_LATE
    assert not last.HasField("granted")
    go_on(peers.draft, gate)
    answer = peers.propose.reports()[-1].grant_end
    assert answer.reason == pb.GRANT_END_REASON_STOPPED
    # Its proposal of then is not taken for one of now.
    peers.grant(id=2, limit=len(PROMPT) + 20)
    (verdict,) = peers.verify.reports()[-1].verdicts
    assert verdict.next_token == fakes.plain(PROMPT, 20)[-1]
    assert peers.propose.reports()[-1].grant_end.reason == pb.GRANT_END_REASON_STOPPED


def test_grant_revoked_at_the_draft_ends_for_both(peers: Peers) -> None:
    peers.grant()
    soon(lambda: len(peers.draft.free) > 3)
    peers.propose.change(id=1)
    verify, draft = peers.ends()
    assert draft.reason == pb.GRANT_END_REASON_REVOKED
    assert verify.reason in (pb.GRANT_END_REASON_REVOKED, pb.GRANT_END_REASON_REFUSED)
    assert peers.base.toy.live == peers.draft.toy.live == 1


def test_grant_for_an_unknown_mailbox_ends_before_its_first_round(peers: Peers) -> None:
    peers.grant(mailbox=77)
    for end in peers.ends():
        assert end.reason == pb.GRANT_END_REASON_PEER
        assert end.message == "mailbox 77 is not mapped here"
        assert end.rounds == 0
    assert peers.base.toy.items == peers.draft.toy.items == []
    # Streams and mailbox are as they were.
    peers.grant(id=2, rounds=2)
    assert [end.rounds for end in peers.ends()] == [2, 2]


@pytest.mark.parametrize("role", ["verify", "draft"])
def test_grant_of_a_stale_epoch_is_refused_and_changes_nothing(peers: Peers, role: str) -> None:
    stale = 1
    peers.grant(epochs=(stale, 2) if role == "verify" else (2, stale))
    last, answer = peers.verify.reports()[-1], peers.propose.reports()[-1]
    assert last.grant_end.reason == pb.GRANT_END_REASON_REFUSED
    assert not last.verdicts
    errors = last.errors if role == "verify" else answer.errors
    assert [(one.epoch, one.code) for one in errors] == [(stale, RefusalCode.STALE_EPOCH)]
    assert peers.base.toy.live == peers.draft.toy.live == 1
    # Nothing was taken in: what the refused grant told is not there to go on from.
    refusing = peers.verify if role == "verify" else peers.propose
    refusing.send(
        [VerifyItem(1, 2, 4, (9,)) if role == "verify" else ProposeItem(1, 2, 4, (9,), 1)]
    )
    (error,) = refusing.read().errors
    assert (error.code, error.held_len) == (RefusalCode.KV_MISSING, 0)
    peers.grant(id=2, limit=len(PROMPT) + 20)
    reports = peers.verify.reports()
    assert reports[-1].grant_end.reason == pb.GRANT_END_REASON_STOPPED
    assert reports[-1].verdicts[0].committed_len == len(PROMPT) + 20
    assert reports[-1].verdicts[0].next_token == fakes.plain(PROMPT, 20)[-1]


def test_grant_over_different_logs_breaks_the_protocol_and_writes_nothing(peers: Peers) -> None:
    peers.grant(draft_log=PROMPT[:-1])
    verify, draft = peers.ends()
    assert (verify.reason, verify.rounds) == (pb.GRANT_END_REASON_PEER, 0)
    assert "3" in verify.message and "4" in verify.message
    # The mailbox is of no more use, which the draft hears at once.
    assert draft.reason == pb.GRANT_END_REASON_PEER
    assert peers.base.toy.items == []


@pytest.mark.parametrize("lost", ["verify", "draft"])
def test_grant_whose_stream_breaks_ends_for_the_other_at_once(peers: Peers, lost: str) -> None:
    peers.grant(patience_seconds=3600.0)
    soon(lambda: len(peers.draft.free) > 3)
    if lost == "verify":
        peers.verify.close()
        # Told in the mailbox, or by its end: whichever the break leaves time for.
        (answer,) = peers.propose.reports()
        ends = (pb.GRANT_END_REASON_STOPPED, pb.GRANT_END_REASON_PEER)
        assert answer.grant_end.reason in ends
        soon(lambda: peers.base.toy.live == 0)
        assert peers.draft.toy.live == 1
    else:
        peers.propose.close()
        end = peers.verify.reports()[-1].grant_end
        assert end.reason != pb.GRANT_END_REASON_CREDITS
        soon(lambda: peers.draft.toy.live == 0)
        assert peers.base.toy.live == 1
