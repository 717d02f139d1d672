"""Requests that come, go and are cancelled for a while over shared memory leave all as it was.

Real models in three processes. ``OUTRIDER_SOAK_SECONDS`` sets how long.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import queue
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from outrider.coordinator.local import children
from outrider.coordinator.local.private_stack import over_sockets
from outrider.protos import generation_pb2 as pb
from outrider.protos import generation_pb2_grpc as rpc
from outrider.shared.config.schema import load
from outrider.shared.link.mailbox import BELLS
from outrider_testing import processes
from outrider_testing.checkpoints import write_llama
from outrider_testing.waiting import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

SECONDS = float(os.environ.get("OUTRIDER_SOAK_SECONDS", "8"))
WARM_SECONDS = min(10.0, SECONDS / 4)
AT_ONCE = 5
PAUSE_SECONDS = 0.1
"""Between requests, on average; the services run by themselves meanwhile."""
MOST_DRIFT = 8 << 20
GREEDY, COUPLED, REJECTION = 1, 2, 3
STYLES: tuple[tuple[int, dict[str, Any]], ...] = (
    (GREEDY, {}),
    (GREEDY, {"repetition_penalty": 1.3}),
    (COUPLED, {"temperature": 0.9, "seed": 3}),
    (COUPLED, {"temperature": 0.7, "seed": 4, "top_k": 20, "top_p": 0.9}),
    # One token is left to choose from: the rule has rows to judge, and one outcome.
    (REJECTION, {"temperature": 0.8, "seed": 5, "top_k": 1}),
    # Its tokens depend on what was proposed: only their number is known beforehand.
    (REJECTION, {"temperature": 0.8, "seed": 6}),
)


@dataclass(frozen=True)
class Kind:
    """One of the requests that are sent again and again."""

    prompt: tuple[int, ...]
    count: int
    rule: int
    sampling: dict[str, Any] = field(hash=False)

    @property
    def fixed(self) -> bool:
        """Whether its tokens are the same however it is speculated."""
        return self.rule != REJECTION or "top_k" in self.sampling

    def request(self, k: int | None) -> pb.GenerateRequest:
        rule: Any = self.rule
        return pb.GenerateRequest(
            prompt_token_ids=pb.TokenIds(ids=self.prompt),
            sampling=pb.SamplingParameters(**self.sampling),
            stopping=pb.StopConditions(max_new_tokens=self.count, ignore_eos=True),
            speculation=pb.SpeculationParameters(k=k, rule=rule),
        )


def kinds(rng: random.Random) -> list[Kind]:
    """A few of each style, of different lengths."""
    return [
        Kind(
            tuple(rng.randrange(1, 320) for _ in range(rng.choice((1, 5, 20, 60)))),
            rng.randrange(4, 96),
            rule,
            sampling,
        )
        for rule, sampling in STYLES
        for _ in range(4)
    ]


class Load:
    """Sends requests and compares what comes."""

    def __init__(self, stub: rpc.GenerationStub, seed: int) -> None:
        self.stub = stub
        self.rng = random.Random(seed)
        self.kinds = kinds(self.rng)
        self.expected: dict[Kind, list[int]] = {}
        self.ends: Counter[str] = Counter()
        self.rounds: list[tuple[float, float]] = []
        """When a request ended, and the seconds that each of its rounds took."""

    async def learn(self) -> None:
        """What the base alone writes, one request after the other."""
        for kind in self.kinds:
            self.expected[kind] = await self.one(kind, 0, "alone")

    async def one(self, kind: Kind, k: int | None, end: str = "whole") -> list[int]:
        """One request; ``end``: how, by the client's will."""
        ids: list[int] = []
        patience = self.rng.uniform(0.0, 0.1)
        options = {"timeout": 0.02 + patience} if end == "deadline" else {"timeout": 60.0}
        began, finished = time.monotonic(), None
        call = self.stub.Generate(kind.request(k), **options)
        try:
            async for message in call:
                ids.extend(message.delta.token_ids)
                finished = message.finished if message.HasField("finished") else None
                if end == "cancel" and time.monotonic() - began > patience:
                    call.cancel()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise  # another request has failed
            assert end == "cancel"
        except grpc.aio.AioRpcError as error:
            assert (end, error.code()) == ("deadline", grpc.StatusCode.DEADLINE_EXCEEDED)
        if finished is not None and finished.reason == pb.FINISH_REASON_MAX_TOKENS:
            self._check(kind, ids, finished)
        elif kind.fixed:
            assert ids == self.expected[kind][: len(ids)]
        return ids

    def _check(self, kind: Kind, ids: list[int], finished: pb.Finished) -> None:
        assert len(ids) == kind.count
        if kind.fixed and kind in self.expected:
            assert ids == self.expected[kind]
        self.ends["finished"] += 1
        speculation = finished.speculation
        self.ends["accepted tokens"] += speculation.accepted
        if speculation.rounds > 1:
            took = speculation.seconds
            seconds = (took.draft + took.verify + took.overhead) / (speculation.rounds - 1)
            self.rounds.append((time.monotonic(), seconds))

    async def run(self, seconds: float) -> None:
        """Requests at random times for so long."""
        gate = asyncio.Semaphore(AT_ONCE)
        until = time.monotonic() + seconds

        async def gated(*args: Any) -> None:
            try:
                await self.one(*args)
            finally:
                gate.release()

        async with asyncio.TaskGroup() as tasks:
            while time.monotonic() < until:
                await gate.acquire()
                k = self.rng.choice((None, *range(8)))
                end = self.rng.choices(("whole", "cancel", "deadline"), (8, 2, 1))[0]
                self.ends[f"sent {end}"] += 1
                tasks.create_task(gated(self.rng.choice(self.kinds), k, end))
                await asyncio.sleep(self.rng.expovariate(1 / PAUSE_SECONDS))


@pytest.fixture
def deployed(tiny_base: Path, short_folder: Path) -> Iterator[dict[str, children.Child]]:
    """All three processes, by their section; the draft is often right."""
    draft = write_llama(short_folder / "model", layers=2, hidden=64, seed=1, rms_norm_eps=0.1)
    config = load(None, flags={}, environment={})
    small: dict[str, Any] = {
        "arena_bytes": 16 << 20, "threads": 1, "device": "cpu", "calibrate": False,
    }  # fmt: skip
    config = over_sockets(
        dataclasses.replace(
            config,
            base=dataclasses.replace(config.base, path=str(tiny_base), **small),
            draft=dataclasses.replace(config.draft, path=str(draft), **small),
            coordinator=dataclasses.replace(
                config.coordinator, tokenizer=str(tiny_base), link="shm"
            ),
        ),
        short_folder,
    )
    events: queue.SimpleQueue[children.Event] = queue.SimpleQueue()
    environment = {"OMP_NUM_THREADS": "1"}
    made = {
        name: children.start(name, config, events, environment)
        for name in ("base", "draft", "coordinator")
    }
    try:
        while not all(one.ready for one in made.values()):
            event = events.get(timeout=200)
            assert event.kind not in ("ended", "failed"), event.text
        yield made
    finally:
        children.stop_in_order(list(made.values()), 10.0)


async def state(stub: rpc.GenerationStub, pids: dict[str, int]) -> dict[str, Any]:
    """What each process holds now."""
    info = await stub.Info(pb.InfoRequest())
    used = info.base.arena_tokens_used + info.draft.arena_tokens_used
    found: dict[str, Any] = {
        "arena tokens in use": used,
        "requests": info.running + info.waiting,
        "link": info.link,
    }
    for name, pid in pids.items():
        found |= {
            f"{name} descriptors": len(processes.descriptors(pid)),
            f"{name} threads": processes.threads(pid),
            f"{name} memory": processes.resident(pid),
        }
        if name != "coordinator":
            found[f"{name} doorbells"] = processes.doorbells(pid)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_soak_over_shared_memory_leaves_everything_as_it_was(
    deployed: dict[str, children.Child], short_folder: Path
) -> None:
    pids = {name: one.process.pid for name, one in deployed.items()}
    async with grpc.aio.insecure_channel(f"unix:{short_folder}/coordinator") as channel:
        stub = rpc.GenerationStub(channel)
        load = Load(stub, 1)
        await load.learn()
        await load.run(WARM_SECONDS)
        before: dict[str, Any] = {}
        after: dict[str, Any] = {}

        async def quiet() -> bool:
            """Threads and connections of the last calls go, too, after a while."""
            earlier = dict(before)
            before.update(await state(stub, pids))
            idle = not (before["requests"] or before["arena tokens in use"])
            return idle and all(
                before[key] == earlier.get(key) for key in before if "memory" not in key
            )

        async def as_before() -> bool:
            after.update(await state(stub, pids))
            return not (after["requests"] or after["arena tokens in use"]) and all(
                after[f"{name} {what}"] <= before[f"{name} {what}"] + 2
                for name in pids
                for what in ("descriptors", "threads")
            )

        await until(quiet)
        rings = processes.mailbox(pids["base"]).word(BELLS[0])
        load.rounds.clear()
        load.ends.clear()
        await load.run(SECONDS)
        rings = processes.mailbox(pids["base"]).word(BELLS[0]) - rings
        await until(as_before)
    times = [seconds for _, seconds in sorted(load.rounds)]
    quarter = len(times) // 4
    first, last = statistics.median(times[:quarter]), statistics.median(times[-quarter:])
    print(f"{SECONDS:g} s, {dict(load.ends)}, {rings} rounds through the mailbox")
    print(f"a round took {1e3 * first:.2f} ms at first, {1e3 * last:.2f} ms at last")
    for key, value in before.items():
        print(f"{key}: {value} -> {after[key]}")
    assert after["link"] == "shm"
    assert rings > 5 * SECONDS and load.ends["accepted tokens"] > rings / 2
    for name in ("base", "draft"):
        assert after[f"{name} doorbells"] == before[f"{name} doorbells"]
    for name in pids:
        assert after[f"{name} memory"] - before[f"{name} memory"] < MOST_DRIFT
    assert last < 3 * first
