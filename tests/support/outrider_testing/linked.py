"""A coordinator in this process over services in processes of their own, sharing memory.

For tests of that link: every request's tokens are checked, and what is left of earlier links.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from outrider.coordinator.telemetry.records import NoObserver, RoundRecord
from outrider.protos import generation_pb2 as pb
from outrider.protos import generation_pb2_grpc as rpc
from outrider.shared.config.schema import CoordinatorConfig
from outrider_testing import clients, processes
from outrider_testing.waiting import until


class Watch(NoObserver):
    """Counts the rounds that wrote something, by the way they travelled."""

    enabled = follows = True

    def __init__(self) -> None:
        self.rounds: Counter[str] = Counter()

    def round(self, record: RoundRecord) -> None:
        self.rounds[record.link] += any(one.emitted for one in record.sequences)


@dataclass
class Pair:
    """Both services, a coordinator in this process, and helpers of the test."""

    services: dict[str, Any]
    stub: rpc.GenerationAsyncStub
    watch: Watch
    link: str
    plain: Callable[[list[int], int], list[int]]
    """The tokens of an undisturbed run, so many after a prompt."""
    prompts: Sequence[list[int]] = tuple([9, 9, last] for last in range(300))
    """What to ask for, """
    lengths: tuple[int, int] = (150, 220)
    """how many tokens at least, and fewer than that many,"""
    most_k: int = 7
    """and with which K at most, where it is harmed."""
    names: set[str] = field(default_factory=set)
    """Sockets of hand-overs that were seen."""

    def pid(self, role: str) -> int:
        return int(self.services[role].pid)

    def bells(self, role: str) -> set[int]:
        return set(processes.doorbells(self.pid(role)))

    async def generate(self, prompt: list[int], count: int, k: int | None) -> None:
        """Runs one request; its tokens must be those of an undisturbed run."""
        request = pb.GenerateRequest(
            prompt_token_ids=pb.TokenIds(ids=prompt),
            stopping=pb.StopConditions(max_new_tokens=count, ignore_eos=True),
            speculation=pb.SpeculationParameters(k=k),
        )
        ids: list[int] = []
        async for message in self.stub.Generate(request, timeout=120):
            ids.extend(message.delta.token_ids)
        assert ids == self.plain(prompt, count)

    async def shared(self) -> bool:
        """Whether the services share memory, as the coordinator sees it."""
        return bool((await self.stub.Info(pb.InfoRequest())).link == self.link)

    async def settled(self) -> None:
        """Granted rounds run over shared memory again, and nothing of earlier mailboxes is left."""

        async def freely() -> bool:
            before = self.watch.rounds[self.link]
            await self.generate(self.prompts[before % len(self.prompts)], 24, 3)
            return self.watch.rounds[self.link] > before

        async def tidy() -> bool:
            info = await self.stub.Info(pb.InfoRequest())
            used = info.base.arena_tokens_used or info.draft.arena_tokens_used
            offered = processes.offers(self.pid("verify"))
            return not (used or offered) and all(
                processes.mailboxes(self.pid(role)) == (1, 1) and len(self.bells(role)) == 1
                for role in self.services
            )

        await until(self.shared)
        await until(freely)
        await until(tidy)
        self.names |= processes.abstract_names(self.pid("verify"))


@asynccontextmanager
async def coordinator(
    services: dict[str, Any],
    plain: Callable[[list[int], int], list[int]],
    **settings: Any,
) -> AsyncIterator[Pair]:
    """A coordinator of its own over ``services``."""
    folder = services["draft"].log.parent
    given: dict[str, Any] = {"tokenizer": str(folder), "drain_seconds": 1.0, "link": "shm"}
    config = CoordinatorConfig(
        listen=f"unix:{folder}/coordinator",
        base_target=services["verify"].listen,
        draft_target=services["draft"].listen,
        **given | settings,
    )
    watch = Watch()
    async with clients.coordinator(config, watch) as client:
        yield Pair(services, client.stub, watch, config.link, plain)
