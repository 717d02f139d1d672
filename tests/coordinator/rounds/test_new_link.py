"""A link that is not there: one class and one row, and everything knows it."""

from __future__ import annotations

import dataclasses
import itertools
import mmap
import socket
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from outrider.coordinator.cli.main import make_parser
from outrider.coordinator.telemetry.records import NoObserver, RoundRecord
from outrider.shared.core.links import AUTO, LINKS, MESSAGES, Link
from outrider.shared.link.doorbell import Doorbell
from outrider.shared.link.handshake import HandoverFailed, Offered
from outrider.shared.link.mailbox import LAYOUT, Layout, Mailbox
from outrider_testing import fakes
from outrider_testing.clients import ask

Make = Callable[..., Any]
PROMPT = [5, 6, 7, 8]


class Pocket:
    """Draft and base in one process: the mailbox goes from one pocket to the other."""

    offers: ClassVar[dict[int, tuple[Layout, Callable[[int, Doorbell], None]]]] = {}
    numbers: ClassVar[Any] = itertools.count(1)
    fetched: ClassVar[int] = 0
    broken: ClassVar[str] = ""

    def __init__(self, link: Link, spin: float, device: Any) -> None:
        self.link, self.spin = link, spin

    def offer(self, layout: Layout, claimed: Callable[[int, Doorbell], None]) -> Offered:
        number = next(self.numbers)
        self.offers[number] = layout, claimed
        return Offered(number, LAYOUT, "", b"", "", layout.size, self.link.name)

    def fetch(self, offered: Offered) -> Doorbell:
        if self.broken:
            raise HandoverFailed(self.broken)
        layout, claimed = self.offers.pop(offered.mailbox)
        mailbox, ends = Mailbox(mmap.mmap(-1, layout.size), layout), socket.socketpair()
        base = Doorbell(mailbox, ends[0], "verify", spin=self.spin)
        draft = Doorbell(mailbox, ends[1], "draft", spin=self.spin)
        base.link = draft.link = self.link.name
        claimed(offered.mailbox, base)
        Pocket.fetched += 1
        return draft


ROW = Link(
    "pocket",
    travels="from hand to hand",
    where="one process",
    way="host",
    carrier=f"{__name__}:Pocket",
)


class Seen(NoObserver):
    """Counts the rounds in which tokens were proposed, by the way they travelled."""

    enabled = True

    def __init__(self) -> None:
        self.links: Counter[str] = Counter()

    def round(self, record: RoundRecord) -> None:
        self.links[record.link] += any(one.proposed for one in record.sequences)


@pytest.fixture(autouse=True)
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The new link, the last of the table and so the best."""
    monkeypatch.setitem(LINKS, ROW.name, ROW)
    monkeypatch.setattr(Pocket, "broken", "")


async def test_new_link_carries_rounds_and_is_told(services: Make, client_of: Make) -> None:
    base, draft = services("verify"), services("draft", agreement=90)
    seen, before = Seen(), Pocket.fetched

    async with client_of(base, draft, seen, link=AUTO) as client:
        info = await client.info()
        assert (info.link, info.link_reason) == (ROW.name, "")
        for k in (3, 0, 5):
            one = (await client.generate(ask(PROMPT, 40, k=k))).only
            assert one.ids == fakes.plain(PROMPT, 40)
    assert Pocket.fetched == before + 1
    assert seen.links[ROW.name] > 8 and len(draft.free) >= seen.links[ROW.name]
    assert set(seen.links) <= {ROW.name, MESSAGES}


@pytest.mark.parametrize("beneath", ["shm", MESSAGES])
async def test_new_link_that_cannot_be_had_says_why_and_leaves_the_one_beneath(
    services: Make,
    client_of: Make,
    monkeypatch: pytest.MonkeyPatch,
    beneath: str,
) -> None:
    base, draft = services("verify"), services("draft", agreement=90)
    monkeypatch.setitem(LINKS, ROW.name, dataclasses.replace(ROW, beneath=beneath))
    monkeypatch.setattr(Pocket, "broken", "the pocket has a hole")

    async with client_of(base, draft, link=AUTO) as client:
        info = await client.info()
        assert (info.link, info.link_reason) == (beneath, "the pocket has a hole")
        one = (await client.generate(ask(PROMPT, 40, k=3))).only
        assert one.ids == fakes.plain(PROMPT, 40)
    assert bool(draft.free) == (beneath != MESSAGES)


def test_new_link_is_offered_by_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_parser().parse_args(["generate", "--help"])
    assert f"cuda-ipc, {ROW.name}" in " ".join(capsys.readouterr().out.split())
