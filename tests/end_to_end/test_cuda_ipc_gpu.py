"""The link `cuda-ipc` with real models in processes of their own, on a real device.

``OUTRIDER_FAULTS`` sets the number of faults.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import queue
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outrider.coordinator.bench.studies import bare_links
from outrider.coordinator.cli import main
from outrider.coordinator.local import children, cuda_mps
from outrider.coordinator.services import mailbox_setup
from outrider.protos import generation_pb2 as pb
from outrider.shared.config.schema import load
from outrider.shared.core.links import LINKS, MESSAGES
from outrider_testing import faults, linked
from outrider_testing.checkpoints import write_llama

pytestmark = pytest.mark.gpu
FAULTS = int(os.environ.get("OUTRIDER_FAULTS", "4"))
SECTIONS = {"verify": "base", "draft": "draft"}
PROMPTS = [[7] * 20, [5, 9, 40], list(range(30, 48))]
MOST_TOKENS = 700
START_SECONDS = 120.0
LEAK_BYTES = 64 << 20


class ModelProcess:
    """One service with its model on the device, killed and started again at one address."""

    def __init__(self, role: str, model: Path, folder: Path, environment: dict[str, str]) -> None:
        self.role, self.listen = role, f"unix:{folder}/{role}"
        self.log = folder / f"{role}.log"
        part: dict[str, Any] = {
            "path": str(model), "device": "cuda", "dtype": "bfloat16",
            "arena_bytes": 64 << 20, "listen": self.listen, "max_calls": 16,
            "calibrate": False,
        }  # fmt: skip
        config = load(None, flags={}, environment={})
        section = SECTIONS[role]
        changed = dataclasses.replace(getattr(config, section), **part)
        self._config = dataclasses.replace(config, **{section: changed})
        self._environment = environment
        self.start()

    @property
    def pid(self) -> int:
        """Of the process that runs, or ran last."""
        return self._child.process.pid

    def start(self) -> None:
        """Starts it and waits until it serves."""
        events: queue.SimpleQueue[children.Event] = queue.SimpleQueue()
        section = SECTIONS[self.role]
        self._child = children.start(section, self._config, events, self._environment)
        while not self._child.ready:
            event = events.get(timeout=START_SECONDS)
            assert event.kind not in ("ended", "failed"), event.text
        self._events = events

    def signal(self, number: int) -> None:
        """Sends it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it at once, stopped or not; what it logged is kept."""
        process = self._child.process
        process.kill()
        process.wait(60)
        assert process.stdin is not None
        process.stdin.close()
        with self.log.open("a") as log:
            while (event := self._events.get(timeout=10)).kind != "ended":
                print(event.text, file=log)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base whose tokens depend on all before them, and a draft that is often right."""
    folder = tmp_path_factory.mktemp("models")
    shape = {"layers": 2, "hidden": 256, "seed": 1}
    return {
        "verify": write_llama(folder / "base", **shape),
        "draft": write_llama(folder / "draft", **shape, rms_norm_eps=0.05),
    }


@pytest.fixture(params=[False, True], ids=["plain", "cuda-mps"])
def environment(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """Without the daemon of CUDA MPS, and with it."""
    with cuda_mps.daemon(request.param) as variables:
        yield dict(variables)


@pytest.fixture
def pair(
    models: dict[str, Path],
    short_folder: Path,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[dict[str, ModelProcess]]:
    """Both services."""
    # Here mailboxes are lost every other second, which a coordinator would come to avoid.
    monkeypatch.setattr(mailbox_setup, "LAST_PAUSE", mailbox_setup.FIRST_PAUSE)
    made: dict[str, ModelProcess] = {}
    try:
        for role, model in models.items():
            made[role] = ModelProcess(role, model, short_folder, environment)
        yield made
    finally:
        for one in made.values():
            one.kill()
            print(one.log.read_text()[-3000:])  # shown where a test fails


def requests() -> list[list[pb.GenerateRequest]]:
    """All rules and some more ways to choose tokens; those of a list run at the same time."""
    ways: list[tuple[int, dict[str, Any]]] = [
        (pb.ACCEPTANCE_RULE_GREEDY, {}),
        (pb.ACCEPTANCE_RULE_GREEDY, {"repetition_penalty": 1.3}),
        (pb.ACCEPTANCE_RULE_COUPLED, {"temperature": 0.8, "seed": 3}),
        (pb.ACCEPTANCE_RULE_COUPLED, {"temperature": 0.8, "seed": 3, "top_p": 0.9}),
        (pb.ACCEPTANCE_RULE_REJECTION, {"temperature": 0.8, "seed": 5}),
    ]
    return [
        [
            pb.GenerateRequest(
                prompt_token_ids=pb.TokenIds(ids=prompt),
                sampling=pb.SamplingParameters(**sampling),
                stopping=pb.StopConditions(max_new_tokens=120, ignore_eos=True),
                speculation=pb.SpeculationParameters(k=k, rule=rule),  # type: ignore[arg-type]
            )
            for prompt in PROMPTS[:batch]
        ]
        for rule, sampling in ways
        for batch in (1, 3)
        for k in (1, 3)
    ]


async def tokens(stub: Any, request: pb.GenerateRequest) -> list[int]:
    """What is streamed."""
    return [id async for one in stub.Generate(request, timeout=120) for id in one.delta.token_ids]


async def test_cuda_ipc_has_the_tokens_of_every_link_for_all_rules(
    pair: dict[str, ModelProcess], models: dict[str, Path]
) -> None:
    found: dict[str, list[list[list[int]]]] = {}
    rounds: dict[str, Any] = {}

    async def run(link: str) -> None:
        options = {"tokenizer": str(models["verify"]), "draft_patience_seconds": 30.0}
        async with linked.coordinator(pair, None, link=link, **options) as both:
            found[link] = [
                await asyncio.gather(*(tokens(both.stub, one) for one in batch))
                for batch in requests()
            ]
            rounds[link] = both.watch.rounds

    for link in LINKS:
        await run(link)
    print(rounds)
    assert all(one == found[MESSAGES] for one in found.values())
    assert all(len(one) == 120 for batch in found[MESSAGES] for one in batch)
    # The device took most of the turns that it can take: those of two of the five ways.
    assert rounds["cuda-ipc"]["cuda-ipc"] > 0.3 * rounds["shm"]["shm"]


@pytest.mark.timeout(900)
async def test_cuda_ipc_faults_change_no_token_and_leak_no_memory(
    pair: dict[str, ModelProcess], models: dict[str, Path]
) -> None:
    import torch

    rng = random.Random(0)
    notices: list[Any] = []
    texts: dict[tuple[int, ...], list[int]] = {}
    free: list[int] = []

    options = {
        "tokenizer": str(models["verify"]),
        "verify_patience_seconds": 60.0,
        "draft_patience_seconds": 1.0,
    }
    async with linked.coordinator(
        pair,
        lambda prompt, count: texts[tuple(prompt)][:count],
        link="cuda-ipc",
        **options,
    ) as both:
        both.prompts, both.lengths, both.most_k = PROMPTS, (400, MOST_TOKENS), 5
        for prompt in PROMPTS:
            request = pb.GenerateRequest(
                prompt_token_ids=pb.TokenIds(ids=prompt),
                stopping=pb.StopConditions(max_new_tokens=MOST_TOKENS, ignore_eos=True),
                speculation=pb.SpeculationParameters(k=0),
            )
            texts[tuple(prompt)] = await tokens(both.stub, request)
        await both.settled()
        for number in range(FAULTS):
            notices.append(await faults.harm(both, rng, number))
            free.append(torch.cuda.mem_get_info()[0])
        print(dict(both.watch.rounds))
    faults.check(notices)
    print(f"device memory free after each fault, MiB: {[one >> 20 for one in free]}")
    assert min(free) > free[0] - LEAK_BYTES
    assert "Traceback" not in "".join(
        one.log.read_text() for one in pair.values() if one.log.exists()
    )


@pytest.mark.parametrize("mps", [False, True], ids=["plain", "cuda-mps"])
def test_cuda_ipc_has_the_tokens_of_one_process(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mps: bool
) -> None:
    monkeypatch.setattr(bare_links, "ROUNDS", 50)
    written = tmp_path / "links.json"
    arguments = ["bench", "links", "--base", str(models["verify"]), "--draft", str(models["draft"])]
    arguments += ["--device", "cuda", "--dtype", "bfloat16", "--links", ",".join(LINKS)]
    arguments += ["--prompts", "2", "--prompt-tokens", "20", "--ks", "0,1,2,3", "--repeats", "2"]
    arguments += ["--json", str(written), *(["--cuda-mps"] if mps else [])]
    assert main.main(arguments) == 0
    figures = json.loads(written.read_text())
    for one in figures["variants"]:
        assert one["same_tokens_as_base"] and one["same_tokens_as_in_process"], one
    # In turns without the host the same tokens are proposed and accepted as in its own.
    rates = {(one["link"], one["k"]): one["acceptance_rate"] for one in figures["variants"]}
    for k in (1, 2, 3):
        assert rates["cuda-ipc", k] == pytest.approx(rates["shm", k], abs=0.02)
