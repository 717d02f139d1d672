"""Services that share memory, harmed in mid-request, and what the other one makes of it."""

from __future__ import annotations

import asyncio
import random
import signal
import statistics
import time
from dataclasses import dataclass
from typing import Any

NOTICE_SECONDS = 5.0
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


async def _noticed(pair: Any, victim: str, kind: str) -> Notice:
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


async def harm(pair: Any, rng: random.Random, number: int) -> Notice:
    """One fault in the midst of three requests, and all that has to be well afterwards.

    ``number``: of the fault; their kinds take turns.
    """
    victim, kind = KINDS[number % len(KINDS)]
    before = pair.watch.rounds[pair.link]
    most = pair.most_k + 1
    calls = [
        asyncio.create_task(
            pair.generate(rng.choice(pair.prompts), rng.randrange(*pair.lengths), k)
        )
        for k in (rng.randrange(1, most), rng.randrange(1, most), rng.randrange(1, most))
    ]
    rounds = before + rng.randrange(1, 25)
    while pair.watch.rounds[pair.link] < rounds and not any(call.done() for call in calls):
        await asyncio.sleep(0)
    await asyncio.sleep(rng.random() * 0.01)  # at any point of a round
    assert not all(call.done() for call in calls)
    notice = await _noticed(pair, victim, kind)
    one = pair.services[victim]
    if kind == "pause":
        one.signal(signal.SIGCONT)
    else:
        await asyncio.to_thread(one.kill)
        await asyncio.to_thread(one.start)
    await asyncio.gather(*calls)
    await pair.settled()
    return notice


def check(notices: list[Notice]) -> None:
    """All were noticed in time, and few fell where nobody was waiting; prints how they were."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for one in notices:
        groups.setdefault((one.victim, one.kind, one.how), []).append(one.seconds)
    for (victim, kind, how), seconds in sorted(groups.items()):
        print(
            f"{victim:6} {kind:5} {how:19} {len(seconds):3} times, after "
            f"{statistics.median(seconds):.3f} s (median), {max(seconds):.3f} s (most)"
        )
    between = [one for one in notices if one.how == "did not wait"]
    assert len(between) <= max(1, len(notices) // 10)
    assert all(one.seconds < NOTICE_SECONDS for one in notices)
