"""Services that share memory, killed and stopped in mid-request: what the other one makes of it.

The services are processes of their own over a toy model, whose next token depends on everything
before it. ``OUTRIDER_FAULTS`` sets the number of faults.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from outrider.coordinator import introducing
from outrider.shared.mailboxes import MOST_MAILBOXES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

FAULTS = int(os.environ.get("OUTRIDER_FAULTS", "8"))
NOTICE_SECONDS = 2.0
# What is done to whom: "pause" goes on later, "hang" is killed later. By default each comes once.
KINDS = [
    (victim, kind)
    for stopped in ("pause", "hang")
    for victim in ("draft", "verify")
    for kind in ("kill", stopped)
]


@dataclass
class Notice:
    """How the survivor of a fault came to know of it."""

    victim: str
    kind: str
    how: str
    seconds: float


@pytest.fixture
def services(
    processes: Any, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., dict[str, Any]]]:
    """``services(verify={…}, draft={…})``: both as processes, with these fields of ``Toy``."""
    # Here mailboxes are lost every other second, which a coordinator would come to avoid.
    monkeypatch.setattr(introducing, "LAST_PAUSE", introducing.FIRST_PAUSE)
    made: dict[str, Any] = {}

    def start(**toys: dict[str, Any]) -> dict[str, Any]:
        for role, toy in toys.items():
            made[role] = processes.ToyProcess(role, short_folder, **toy)
        return made

    yield start
    for one in made.values():
        one.kill()


async def noticed(pair: Any, victim: str, kind: str) -> Notice:
    """Harms ``victim`` and waits until the other service knows."""
    survivor = "verify" if victim == "draft" else "draft"
    bells, alone = pair.bells(survivor), pair.watch.rounds["grpc"]
    assert len(bells) == 1
    began = time.monotonic()
    pair.services[victim].signal(signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
    went_on = 0.0
    while (now := time.monotonic() - began) < NOTICE_SECONDS:
        if not bells & pair.bells(survivor):
            return Notice(victim, kind, "closed its doorbell", now)
        if victim == "draft" and not went_on and pair.watch.rounds["grpc"] > alone + 1:
            went_on = now
            if kind != "kill":  # it gave the draft up for this time, not the mailbox
                return Notice(victim, kind, "went on alone", now)
        await asyncio.sleep(0.002)
    # It fell between two grants: nobody was waiting at the doorbell.
    return Notice(victim, kind, "did not wait", went_on)


async def harm(pair: Any, rng: random.Random, victim: str, kind: str) -> Notice:
    """One fault in the midst of three requests, and all that has to be well afterwards."""
    before = pair.watch.rounds["shm"]
    calls = [
        asyncio.create_task(
            pair.generate([rng.randrange(300) for _ in range(4)], rng.randrange(150, 220), k)
        )
        for k in (rng.randrange(1, 8), rng.randrange(1, 8), rng.randrange(1, 8))
    ]
    rounds = before + rng.randrange(1, 25)
    while pair.watch.rounds["shm"] < rounds and not any(call.done() for call in calls):
        await asyncio.sleep(0)
    await asyncio.sleep(rng.random() * 0.01)  # at any point of a round
    assert not all(call.done() for call in calls)
    notice = await noticed(pair, victim, kind)
    one = pair.services[victim]
    if kind == "pause":
        one.signal(signal.SIGCONT)
    else:
        await asyncio.to_thread(one.kill)
        await asyncio.to_thread(one.start)
    await asyncio.gather(*calls)
    await pair.settled()
    return notice


def test_faults_late_word_of_an_old_mailbox_leaves_the_new_one_alone(
    services: Any, linked: Any, processes: Any, fakes: Any, short_folder: Path
) -> None:
    pair = services(draft={})
    base = fakes.ToyService(
        "verify", f"unix:{short_folder}/base", fakes.Toy(model=str(short_folder))
    )
    draft, pid = pair["draft"], os.getpid()

    async def run() -> None:
        async with linked.coordinator({"verify": base, "draft": draft}, processes, fakes) as both:
            before = processes.mailboxes(pid)[0]
            call = asyncio.create_task(both.generate([5, 6, 7], 150, 3))

            async def freely() -> bool:
                return both.watch.rounds["shm"] > 3

            async def held() -> bool:
                return hold.reached.is_set()

            await linked.until(freely)
            hold = base.toy.stand()
            await linked.until(held)
            # The verifier is amidst a round while the draft comes back and fetches a new mailbox.
            await asyncio.to_thread(draft.kill)
            await asyncio.to_thread(draft.start)
            await linked.until(both.shared)
            bells = both.bells("draft")
            base.toy.hold = None
            hold.set()
            await call
            assert await both.shared()
            assert both.bells("draft") == bells
            assert processes.mailboxes(pid)[0] <= before + 1

    try:
        asyncio.run(run())
    finally:
        base.kill()


def test_faults_coordinators_that_come_and_go_leave_no_mailbox(
    services: Any, linked: Any, processes: Any, fakes: Any
) -> None:
    pair = services(verify={}, draft={})

    async def tidy() -> bool:
        return all(processes.mailboxes(one.pid) == (0, 0) for one in pair.values())

    async def run() -> None:
        for _ in range(MOST_MAILBOXES + 2):
            async with linked.coordinator(pair, processes, fakes) as both:
                await both.generate([3, 1, 4], 24, 3)
                assert both.watch.rounds["shm"] > 0
        await linked.until(tidy)

    asyncio.run(run())


def report(notices: list[Notice]) -> None:
    """A line for each victim, kind and way of noticing."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for one in notices:
        groups.setdefault((one.victim, one.kind, one.how), []).append(one.seconds)
    for (victim, kind, how), seconds in sorted(groups.items()):
        print(
            f"{victim:6} {kind:5} {how:19} {len(seconds):3} times, after "
            f"{statistics.median(seconds):.3f} s (median), {max(seconds):.3f} s (most)"
        )


@pytest.mark.timeout(1800)
# A draft that stands still is given up by patience or by its heartbeat, whichever comes first.
@pytest.mark.parametrize(("patience", "first"), [(1.0, 0), (5.0, 4)])
def test_faults_change_no_token_and_leave_nothing_behind(
    services: Any, linked: Any, processes: Any, fakes: Any, patience: float, first: int
) -> None:
    pair = services(verify={"seconds_per_round": 0.003}, draft={"seconds_per_round": 0.001})
    rng = random.Random(first)
    notices: list[Notice] = []
    names: set[str] = set()

    async def run() -> None:
        async with linked.coordinator(
            pair, processes, fakes, draft_patience_seconds=patience
        ) as both:
            await both.settled()
            for number in range(first, first + FAULTS // 2):
                notices.append(await harm(both, rng, *KINDS[number % len(KINDS)]))
            names.update(both.names)

    asyncio.run(run())
    report(notices)
    between = [one for one in notices if one.how == "did not wait"]
    assert len(between) <= max(1, len(notices) // 10)
    assert all(one.seconds < NOTICE_SECONDS for one in notices)
    for one in pair.values():
        one.kill()
        assert "Traceback" not in one.log.read_text()
    assert len(names) >= 2
    assert not names & processes.abstract_names()
    assert not [one for one in Path("/dev/shm").iterdir() if "outrider" in one.name]
