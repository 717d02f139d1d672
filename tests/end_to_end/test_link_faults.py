"""Services that share memory, killed and stopped in mid-request: what the other one makes of it.

The services are processes of their own over a toy model, whose next token depends on everything
before it. ``OUTRIDER_FAULTS`` sets the number of faults.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from outrider.coordinator.services import mailbox_setup
from outrider.shared.link.registry import MOST_MAILBOXES
from outrider_testing import fakes, faults, linked, processes
from outrider_testing.waiting import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

FAULTS = int(os.environ.get("OUTRIDER_FAULTS", "8"))


@pytest.fixture
def services(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., dict[str, Any]]]:
    """``services(verify={…}, draft={…})``: both as processes, with these fields of ``Toy``."""
    # Here mailboxes are lost every other second, which a coordinator would come to avoid.
    monkeypatch.setattr(mailbox_setup, "LAST_PAUSE", mailbox_setup.FIRST_PAUSE)
    made: dict[str, Any] = {}

    def start(**toys: dict[str, Any]) -> dict[str, Any]:
        for role, toy in toys.items():
            made[role] = processes.ToyProcess(role, short_folder, **toy)
        return made

    yield start
    for one in made.values():
        one.kill()


async def test_faults_late_word_of_an_old_mailbox_leaves_the_new_one_alone(
    services: Any, short_folder: Path
) -> None:
    pair = services(draft={})
    base = fakes.ToyService(
        "verify", f"unix:{short_folder}/base", fakes.Toy(model=str(short_folder))
    )
    draft, pid = pair["draft"], os.getpid()

    try:
        both_services = {"verify": base, "draft": draft}
        async with linked.coordinator(both_services, fakes.plain) as both:
            before = processes.mailboxes(pid)[0]
            call = asyncio.create_task(both.generate([5, 6, 7], 150, 3))

            async def freely() -> bool:
                return both.watch.rounds["shm"] > 3

            async def held() -> bool:
                return hold.reached.is_set()

            await until(freely)
            hold = base.toy.stand()
            await until(held)
            # The verifier is amidst a round while the draft comes back and fetches a new mailbox.
            await asyncio.to_thread(draft.kill)
            await asyncio.to_thread(draft.start)
            await until(both.shared)
            bells = both.bells("draft")
            base.toy.hold = None
            hold.set()
            await call
            assert await both.shared()
            assert both.bells("draft") == bells
            assert processes.mailboxes(pid)[0] <= before + 1
    finally:
        base.kill()


async def test_faults_coordinators_that_come_and_go_leave_no_mailbox(services: Any) -> None:
    pair = services(verify={}, draft={})

    async def tidy() -> bool:
        return all(processes.mailboxes(one.pid) == (0, 0) for one in pair.values())

    for _ in range(MOST_MAILBOXES + 2):
        async with linked.coordinator(pair, fakes.plain) as both:
            await both.generate([3, 1, 4], 24, 3)
            assert both.watch.rounds["shm"] > 0
    await until(tidy)


@pytest.mark.slow
@pytest.mark.timeout(1800)
# A draft that stands still is given up by patience or by its heartbeat, whichever comes first.
@pytest.mark.parametrize(("patience", "first"), [(1.0, 0), (5.0, 4)])
async def test_faults_change_no_token_and_leave_nothing_behind(
    services: Any, patience: float, first: int
) -> None:
    pair = services(verify={"seconds_per_round": 0.003}, draft={"seconds_per_round": 0.001})
    rng = random.Random(first)
    notices: list[Any] = []
    names: set[str] = set()

    async with linked.coordinator(pair, fakes.plain, draft_patience_seconds=patience) as both:
        await both.settled()
        for number in range(first, first + FAULTS // 2):
            notices.append(await faults.harm(both, rng, number))
        names.update(both.names)
        for one in pair.values():  # memory without a name
            assert not any("/dev/shm/" in line for line in processes.mapped(one.pid))
    faults.check(notices)
    for one in pair.values():
        one.kill()
        assert "Traceback" not in one.log.read_text()
    assert len(names) >= 2
    assert not names & processes.abstract_names()
    assert not [one for one in Path("/dev/shm").iterdir() if "outrider" in one.name]
