"""The link `cuda-ipc` end to end, with the devices played by the host."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from outrider.coordinator.rounds.granted import GrantedRounds
from outrider.coordinator.telemetry.records import NoObserver, RoundRecord
from outrider.protos import generation_pb2 as pb
from outrider.shared.config.schema import DraftConfig, VerifyConfig
from outrider.shared.core.errors import ConfigError
from outrider.shared.core.links import LINKS, MESSAGES
from outrider.shared.rounds import device_turns
from outrider_testing import host_device
from outrider_testing.clients import ask
from outrider_testing.model_services import start_model
from outrider_testing.waiting import soon

Make = Callable[..., Any]
PROMPTS = [[7] * 20, [5, 9, 40], list(range(30, 48))]
COUNT = 24


class Seen(NoObserver):
    """Counts rounds by the way their proposals travelled."""

    enabled = True

    def __init__(self) -> None:
        self.links: Counter[str] = Counter()

    def round(self, record: RoundRecord) -> None:
        self.links[record.link] += 1


@pytest.fixture(scope="module")
def pair(
    tiny_base: Path, near_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """The base, and a draft that is the base with a little noise, on devices of the host's."""
    import torch

    from outrider.shared.link.device.handshake import DeviceSide

    folder = tmp_path_factory.mktemp("device")
    options: dict[str, Any] = {
        "device": "cpu", "dtype": "float32", "arena_bytes": 32 << 20, "threads": 1,
        "runner": "llama",
    }  # fmt: skip
    memory = host_device.HostMemory()
    with ExitStack() as stack:
        made = {}
        for role, config in (
            ("verify", VerifyConfig(path=str(tiny_base), **options)),
            ("draft", DraftConfig(path=str(near_base), **options)),
        ):
            made[role] = start_model(
                role,
                config,
                f"unix:{folder}/{role}",
                lambda plain: host_device.hosted(plain, 16),
                DeviceSide(torch.device("cpu"), memory),
            )
            stack.callback(made[role].engine.runner.stop)
            stack.callback(made[role].server.drain, grace=0)
        yield SimpleNamespace(**made, folder=tiny_base)


def settings(pair: SimpleNamespace, link: str, **changes: Any) -> dict[str, Any]:
    rounds = 0 if link == "grpc" else 6
    made = {"link": link, "grant_rounds": rounds, "tokenizer": str(pair.folder)}
    return made | {"draft_patience_seconds": 20.0} | changes


async def ask_all(client: Any, requests: list[pb.GenerateRequest]) -> list[Any]:
    results = await asyncio.gather(*(client.generate(request) for request in requests))
    assert [result.error for result in results] == [None] * len(requests)
    return [one for result in results for _, one in sorted(result.samples.items())]


def emptied(pair: SimpleNamespace) -> None:
    """Waits until both services have let go of everything, the engines' locks among it."""
    soon(lambda: not any(one.engine.info().arena_tokens_used for one in (pair.verify, pair.draft)))


async def compared(
    pair: SimpleNamespace, client_of: Make, requests: list[pb.GenerateRequest], **changes: Any
) -> Seen:
    """The same text over messages and over device memory; how the latter's rounds went."""

    async def run(link: str, seen: Seen) -> list[Any]:
        async with client_of(
            pair.verify, pair.draft, seen, **settings(pair, link, **changes)
        ) as client:
            info = await client.info()
            assert (info.link, info.link_reason) == (link, "")
            return [
                (one.ids, one.text, one.finished.reason) for one in await ask_all(client, requests)
            ]

    wanted = await run("grpc", Seen())
    seen = Seen()
    assert await run("cuda-ipc", seen) == wanted
    emptied(pair)
    return seen


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("k", [1, 3, None])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_device_link_gives_what_messages_give(
    pair: SimpleNamespace, client_of: Make, batch: int, k: int | None, temperature: float
) -> None:
    before = len(pair.verify.free), len(pair.draft.free)
    requests = [
        ask(prompt, COUNT, k=k, temperature=temperature, seed=i, stopping={"ignore_eos": True})
        for i, prompt in enumerate(PROMPTS[:batch])
    ]
    seen = await compared(pair, client_of, requests)
    if k is not None:  # else it may find that the draft does not pay here
        # Also where one of several has a single token to go.
        assert seen.links["cuda-ipc"] > 0 and not seen.links["shm"]
        free = pair.verify.free[before[0] :]
        assert max(len(item.proposal) for _, items in free for item in items) == k
        assert len(pair.draft.free) > before[1]


@pytest.mark.parametrize(("one", "link"), [(True, "cuda-ipc"), (False, "shm")])
async def test_device_link_is_taken_by_itself_on_one_device_alone(
    pair: SimpleNamespace, client_of: Make, monkeypatch: pytest.MonkeyPatch, one: bool, link: str
) -> None:
    if not one:
        names = itertools.count()
        monkeypatch.setattr(host_device.HostMemory, "device_uuid", lambda *_: str(next(names)))

    async with client_of(pair.verify, pair.draft, **settings(pair, "auto")) as client:
        info = await client.info()
        assert (info.link, info.link_reason) == (link, "")


@pytest.mark.parametrize("link", LINKS)
async def test_info_tells_the_link_that_was_asked_for(
    pair: SimpleNamespace, client_of: Make, link: str
) -> None:
    async with client_of(pair.verify, pair.draft, **settings(pair, link)) as client:
        info = await client.info()
        assert (info.link, info.link_reason) == (link, "")


async def test_device_link_streams_a_stop_string(pair: SimpleNamespace, client_of: Make) -> None:
    async with client_of(pair.verify, pair.draft, **settings(pair, "grpc")) as client:
        (one,) = await ask_all(client, [ask(PROMPTS[0], 40, stopping={"ignore_eos": True})])
    text = str(one.text)
    stop = next(text[i : i + 2] for i in range(20, len(text)) if "\ufffd" not in text[i : i + 2])
    request = ask(PROMPTS[0], 40, k=3, stopping={"ignore_eos": True, "stop": [stop]})
    assert (await compared(pair, client_of, [request])).links["cuda-ipc"] > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": 1.3},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 0.7, "rule": pb.ACCEPTANCE_RULE_REJECTION},
    ],
    ids=["penalty", "top_p", "rejection"],
)
async def test_device_link_leaves_to_the_hosts_what_the_devices_cannot_do(
    pair: SimpleNamespace, client_of: Make, changes: dict[str, Any]
) -> None:
    request = ask(PROMPTS[0], COUNT, k=3, seed=7, stopping={"ignore_eos": True}, **changes)
    seen = await compared(pair, client_of, [request])
    assert seen.links["shm"] > 0 and seen.links["cuda-ipc"] == 0


def test_device_link_is_left_for_the_ks_that_were_refused_alone() -> None:
    """A smaller K has fewer rows, which the devices may have room for."""
    setup: Any = SimpleNamespace(link="cuda-ipc")
    nobody: Any = None
    drafting: Any = SimpleNamespace(lacking=lambda sequence: False)
    granted = GrantedRounds(drafting, nobody, setup, clock=nobody, rounds=8, draft_patience=1.0)

    def link(*ks: int, left: int = 9) -> str:
        one = SimpleNamespace(host_k=4, max_k=left - 1, draft=SimpleNamespace(open=True))
        plan: Any = SimpleNamespace(decode=[one] * len(ks))
        return granted._link(plan, list(ks))

    assert [link(4, 2), link(5, 1)] == ["shm", "shm"]
    assert [link(3, 2), link(1, 1)] == ["cuda-ipc", "cuda-ipc"]
    assert link(3, 0) == "shm"  # the devices draft for all
    assert link(3, 0, left=1) == "cuda-ipc"  # or find that there is no room for a proposal
    assert link(0, 0) == MESSAGES


async def test_device_link_takes_in_what_is_behind_at_once(
    pair: SimpleNamespace, client_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one sequence after the other, each of which would cost a forward."""
    taken: list[tuple[str, int]] = []
    take_in = device_turns.take_in

    def seen(session: Any, items: Any) -> None:
        taken.append((type(session.engine).__name__, len(items)))
        take_in(session, items)

    monkeypatch.setattr(device_turns, "take_in", seen)
    requests = [
        ask(prompt, COUNT, k=2 + i % 2, stopping={"ignore_eos": True})
        for i, prompt in enumerate(PROMPTS)
    ]
    assert (await compared(pair, client_of, requests)).links["cuda-ipc"] > 0
    grants = Counter(engine for engine, _ in taken)
    assert grants["DraftEngine"] == grants["VerifyEngine"] >= 2
    # Between grants the draft lacks no more than its turns forward by themselves.
    assert sum(count > 0 for engine, count in taken if engine == "DraftEngine") <= 1


async def test_device_link_runs_several_samples_of_one_prompt(
    pair: SimpleNamespace, client_of: Make
) -> None:
    output = {"num_samples": 3}
    request = ask(
        PROMPTS[0],
        COUNT,
        k=3,
        seed=7,
        temperature=0.9,
        stopping={"ignore_eos": True},
        output=output,
    )
    assert (await compared(pair, client_of, [request])).links["cuda-ipc"] > 0


async def test_device_link_makes_room_for_who_comes_and_lets_go_of_who_leaves(
    pair: SimpleNamespace, client_of: Make
) -> None:
    async def run(link: str) -> list[Any]:
        async with client_of(
            pair.verify, pair.draft, **settings(pair, link, grant_rounds=200)
        ) as client:
            long = asyncio.ensure_future(
                client.generate(ask(PROMPTS[0], 150, k=2, stopping={"ignore_eos": True}))
            )
            leaving = client.stub.Generate(ask(PROMPTS[1], 150, k=2, stopping={"ignore_eos": True}))
            async for message in leaving:
                if message.HasField("delta"):
                    break
            leaving.cancel()
            short = await client.generate(ask(PROMPTS[2], 8, k=2, stopping={"ignore_eos": True}))
            assert not long.done()
            return [(await long).samples[0].ids, short.samples[0].ids]

    wanted = await run("grpc")
    assert await run("cuda-ipc") == wanted
    emptied(pair)


async def test_device_link_that_cannot_be_had_is_an_error_that_says_why(
    model_pair: SimpleNamespace, client_of: Make
) -> None:
    options = {"link": "cuda-ipc", "tokenizer": str(model_pair.folder)}
    with pytest.raises(
        ConfigError, match=r"link = 'cuda-ipc' can't be had: .*takes no turns on a device"
    ):
        async with client_of(model_pair.verify, model_pair.draft, **options):
            pass
