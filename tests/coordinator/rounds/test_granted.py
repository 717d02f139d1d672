"""Rounds that draft and verifier run by themselves: no token differs, and they end when told to."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from outrider.coordinator.server.runtime import Runtime
from outrider.coordinator.telemetry.records import NoObserver, RoundRecord
from outrider.protos import generation_pb2 as pb
from outrider.shared.config.schema import DraftConfig, VerifyConfig
from outrider.shared.core.rules import RULES
from outrider_testing import engines, fakes
from outrider_testing.clients import ask
from outrider_testing.model_services import start_model
from outrider_testing.waiting import soon, until

Make = Callable[..., Any]
PROMPT = [5, 6, 7, 8]
# None is longer than what a proposal takes along: which rounds have one, and so the noise that
# `rejection` uses, does not depend on when the requests came.
PROMPTS = [[7] * 20, [5, 9, 40], [11], list(range(30, 48))]
COUNT = 18
LINKS = {"messages": ("grpc", False), "grants": ("grpc", True), "mailbox": ("shm", True)}


class Seen(NoObserver):
    """Keeps how each round's proposals travelled, and the coordinator at hand."""

    enabled = True
    runtime: Runtime

    def __init__(self) -> None:
        self.links: list[str] = []

    def attach(self, runtime: Any) -> None:
        self.runtime = runtime

    def round(self, record: RoundRecord) -> None:
        self.links.append(record.link)


def pairwise(*factors: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Few rows in which any two values of different factors meet."""

    def pairs(row: tuple[Any, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(row), 2))

    # Samples of several requests begin in an order of their own, see PROMPTS.
    rows = [
        row
        for row in itertools.product(*factors)
        if not (RULES[row[0]].needs_rows and row[2] > 1 and row[3] == "samples")
    ]
    left = set().union(*map(pairs, rows))
    chosen = []
    while left:
        best = max(rows, key=lambda row: len(pairs(row) & left))
        chosen.append(best)
        left -= pairs(best)
    return chosen


FEATURES: dict[str, dict[str, Any]] = {
    "max_tokens": {},
    "few_tokens": {"n": 4},
    "stop_token": {},
    "stop_string": {},
    "penalties": {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.4,
        "bad_words": [pb.TokenIds(ids=[3])],
        "output": {"logprobs": 3},
    },
    "samples": {"output": {"num_samples": 3}},
    # The base wants to end at once, and may from the 13th token on: within a proposal.
    "min_new_tokens": {"min_new_tokens": 12, "logit_bias": {0: 500.0}},
}
CASES = pairwise(tuple(RULES), (0, 1, 4, 7), (1, 4), tuple(FEATURES), (1, 5, 64))


@pytest.fixture(scope="module")
def pair(
    tiny_base: Path, near_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """Real engines; the draft is the base with a little noise, so it is right now and then."""
    folder = tmp_path_factory.mktemp("pair")
    options: dict[str, Any] = {
        "device": "cpu", "dtype": "float32", "arena_bytes": 32 << 20, "threads": 1,
    }  # fmt: skip
    with ExitStack() as stack:
        made = {}
        for role, config in (
            ("verify", VerifyConfig(path=str(tiny_base), **options)),
            ("draft", DraftConfig(path=str(near_base), **options)),
        ):
            made[role] = start_model(role, config, f"unix:{folder}/{role}")
            stack.callback(made[role].server.drain, grace=0)
        yield SimpleNamespace(**made, folder=tiny_base)


def connection(pair: SimpleNamespace, way: str, rounds: int = 5) -> dict[str, Any]:
    """Settings of a coordinator whose rounds go one of the three ways of ``LINKS``."""
    link, free = LINKS[way]
    settings = {"link": link, "grant_rounds": rounds if free else 0}
    # A draft that is late once would have `rejection` go on with other noise.
    return settings | {"tokenizer": str(pair.folder), "draft_patience_seconds": 30.0}


async def ask_all(client: Any, requests: list[pb.GenerateRequest]) -> list[Any]:
    """Every sample of all ``requests``, run at once."""
    results = await asyncio.gather(*(client.generate(request) for request in requests))
    assert [result.error for result in results] == [None] * len(requests)
    return [one for result in results for _, one in sorted(result.samples.items())]


def told(one: Any) -> tuple[Any, ...]:
    """What a client is told of a sample, however the rounds were run."""
    end = one.finished
    token = end.stop_token_id if end.HasField("stop_token_id") else None
    return one.ids, one.text, end.reason, end.stop_string, token


def emptied(pair: SimpleNamespace) -> None:
    """Waits until the services have let go of everything, which they do after the goodbye."""
    soon(
        lambda: (
            not any(
                info.sequences or info.arena_tokens_used
                for info in (pair.verify.engine.info(), pair.draft.engine.info())
            )
        )
    )


# --- the tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "k", "batch", "feature", "rounds"), CASES)
async def test_granted_rounds_gives_what_messages_give(
    pair: SimpleNamespace, client_of: Make, rule: str, k: int, batch: int, feature: str, rounds: int
) -> None:
    sampling = {"temperature": 0.8, "top_p": 0.95} if RULES[rule].samples else {}
    changes = dict(sampling, **FEATURES[feature])
    count = changes.pop("n", COUNT)
    stopping: dict[str, Any] = {"ignore_eos": feature != "min_new_tokens"}

    def requests() -> list[pb.GenerateRequest]:
        return [
            ask(prompt, count, k=k, rule=RULES[rule].number, seed=i, stopping=stopping, **changes)
            for i, prompt in enumerate(PROMPTS[:batch])
        ]

    async def by_messages() -> list[Any]:
        async with client_of(pair.verify, pair.draft, **connection(pair, "messages")) as client:
            wanted = await ask_all(client, requests())
            # Now that the text is known, one that ends in the midst of it.
            if feature == "stop_token":
                stopping["stop_token_ids"] = [wanted[0].ids[12]]
            elif feature == "stop_string":
                text = wanted[0].text
                stopping["stop"] = [next(
                    text[at : at + 2]
                    for at in range(2 * len(text) // 3, len(text))
                    if "\ufffd" not in text[at : at + 2]
                )]  # fmt: skip
            else:
                return wanted
            return await ask_all(client, requests())

    async def run(way: str, wanted: list[Any]) -> None:
        seen = Seen()
        before = [len(pair.verify.free), len(pair.draft.free)]
        settings = connection(pair, way, rounds)
        async with client_of(pair.verify, pair.draft, seen, **settings) as client:
            info = await client.info()
            assert (info.link, info.link_reason) == (LINKS[way][0], "")
            found = await ask_all(client, requests())
        assert [told(one) for one in found] == [told(one) for one in wanted]
        for one, other in zip(found, wanted, strict=True):
            assert len(one.logprobs) == (len(one.ids) if feature == "penalties" else 0)
            for entry, wanted_entry in zip(one.logprobs, other.logprobs, strict=True):
                assert entry.logprob == pytest.approx(wanted_entry.logprob, abs=1e-4)
                assert [top.token_id for top in entry.top] == [
                    top.token_id for top in wanted_entry.top
                ]
        # That was the way it should have gone; a short text may be over before.
        free = pair.verify.free[before[0] :], pair.draft.free[before[1] :]
        if feature != "few_tokens" and (way == "mailbox" or k == 0):
            assert free[0]
        if feature != "few_tokens" and way == "mailbox" and k:
            assert "shm" in seen.links
            assert max(len(item.proposal) for _, items in free[0] for item in items) == k
            assert max(item.k for _, items in free[1] for item in items) == k
        elif way != "mailbox":
            assert set(seen.links) == {"grpc"}
            # Nothing is drafted but by message; the last token of all is never worth it.
            assert not free[1] and not any(item.proposal for _, items in free[0] for item in items)

    wanted = await by_messages()
    ends = {
        "stop_token": pb.FINISH_REASON_STOP_TOKEN,
        "stop_string": pb.FINISH_REASON_STOP_STRING,
        "min_new_tokens": pb.FINISH_REASON_END_OF_SEQUENCE,
    }
    assert wanted[0].finished.reason == ends.get(feature, pb.FINISH_REASON_MAX_TOKENS)
    for way in ("grants", "mailbox"):
        await run(way, wanted)
    emptied(pair)


@pytest.fixture(scope="module")
def written(tiny_base: Path) -> list[list[int]]:
    """What transformers' generate writes after each of ``PROMPTS`` with the base alone."""
    import torch
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(str(tiny_base), dtype=torch.float32)
    model.eval()
    return [
        engines.reference(model, prompt, COUNT, repetition_penalty=1.2, eos_token_id=None)
        for prompt in PROMPTS
    ]


@pytest.mark.parametrize("way", LINKS)
async def test_granted_rounds_greedy_equals_transformers_for_every_k(
    pair: SimpleNamespace, written: list[list[int]], client_of: Make, way: str
) -> None:
    async with client_of(pair.verify, pair.draft, **connection(pair, way)) as client:
        for k in (0, 1, 4, 7, None):
            requests = [
                ask(prompt, COUNT, k=k, repetition_penalty=1.2, stopping={"ignore_eos": True})
                for prompt in PROMPTS
            ]
            samples = await ask_all(client, requests)
            assert [one.ids for one in samples] == written
            if k:
                # Of all that can come of a proposal, each came.
                figures = [one.finished.speculation for one in samples]
                accepted = sum(one.accepted for one in figures)
                assert 0 < accepted < sum(one.proposed for one in figures)
    emptied(pair)


async def test_granted_rounds_grant_is_renewed_before_it_runs_out(
    services: Make, client_of: Make
) -> None:
    base = services("verify", seconds_per_round=0.005)
    draft = services("draft", agreement=0)

    async with client_of(base, draft, grant_rounds=8) as client:
        assert (await client.generate(ask(PROMPT, 60, k=1))).only.ids == fakes.plain(PROMPT, 60)
        await until(lambda: len(base.free) == len(draft.free) == 58)
    # Two rounds by message, which open the sequence on one side each, and one grant.
    assert len({number for number, _ in base.free}) == 1
    # The last token leaves no room for a proposal.
    assert [len(items) for _, items in draft.free] == [1] * 57 + [0]


async def test_granted_rounds_grant_may_take_longer_than_a_service_may_be_silent(
    services: Make, client_of: Make
) -> None:
    base = services("verify", seconds_per_round=0.1)
    draft = services("draft", agreement=0)
    silence = {"verify_timeout_seconds": 2.5, "draft_timeout_seconds": 2.5}

    async with client_of(base, draft, link="shm", **silence) as client:
        assert (await client.generate(ask(PROMPT, 30, k=1))).only.ids == fakes.plain(PROMPT, 30)
    assert len({number for number, _ in base.free}) == 1
    assert len(draft.toy.opened) == 1


# --- the ends, and the changes ---------------------------------------------------------------


@pytest.mark.parametrize("standing", ["verify", "draft"])
@pytest.mark.parametrize("event", ["cancel", "deadline"])
async def test_granted_rounds_ends_after_the_round_in_which_nobody_wants_it_any_more(
    services: Make, client_of: Make, standing: str, event: str
) -> None:
    both = {"verify": services("verify", seconds_per_round=0.002), "draft": services("draft")}
    base, draft = both["verify"], both["draft"]
    toy = both[standing].toy

    async with client_of(base, draft, link="shm", draft_patience_seconds=60.0) as client:
        call = client.stub.Generate(
            ask(PROMPT, 3000, k=3), timeout=2.0 if event == "deadline" else None
        )
        await until(lambda: len(base.free) > 3)
        gate = toy.stand()
        await until(gate.reached.is_set)
        before = base.toy.rounds, draft.toy.rounds
        if event == "cancel":
            call.cancel()
        else:
            assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        # The word reaches the services while one of them stands still.
        await until(lambda: base.changes and not base.changes[-1].rounds)
        toy.hold = None
        gate.set()
        await until(lambda: base.toy.live == draft.toy.live == 0)
        assert base.toy.rounds - before[0] == 1
        assert draft.toy.rounds - before[1] <= 1
        assert base.toy.used == draft.toy.used == 0
        info = await client.info()
        assert (info.running, info.waiting, info.link) == (0, 0, "shm")
        # And all is as before for the next one.
        free = len(base.free)
        assert (await client.generate(ask(PROMPT, 40, k=3))).only.ids == fakes.plain(PROMPT, 40)
        assert len(base.free) > free


async def test_granted_rounds_takes_in_a_new_request_after_the_round(
    services: Make, client_of: Make
) -> None:
    base, draft = services("verify", seconds_per_round=0.001), services("draft", agreement=90)

    found = 0

    async with client_of(base, draft, link="shm") as client:
        first = asyncio.create_task(client.generate(ask(PROMPT, 400, k=2)))
        await until(lambda: len(base.free) > 3)
        gate = base.toy.stand()
        await until(gate.reached.is_set)
        found = len(base.toy.items)
        second = asyncio.create_task(client.generate(ask([9, 9], 30, k=4)))
        await until(lambda: base.changes and not base.changes[-1].rounds)
        base.toy.hold = None
        gate.set()
        assert (await second).only.ids == fakes.plain([9, 9], 30)
        # They went on together by themselves, and then one of them alone.
        assert {2} <= {len(items) for _, items in base.free}
        alone = len(base.free)
        assert (await first).only.ids == fakes.plain(PROMPT, 400)
        assert {len(items) for _, items in base.free[alone + 2 :]} == {1}
    ids = [item.sequence_id for item in base.toy.items]
    # The round that ran, and the one that takes in the prompt beside it.
    assert ids.index(2) - found <= 2
    assert base.toy.live == draft.toy.live == 0


@pytest.mark.parametrize("k", [0, 3])
async def test_granted_rounds_ends_after_the_round_that_completes_a_stop_string(
    services: Make, client_of: Make, tiny_base: Path, k: int
) -> None:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tiny_base / "tokenizer.json"))
    ids = fakes.plain(PROMPT, 80, vocab=320)
    text = backend.decode(ids)
    stop = next(
        text[at : at + 2]
        for at in range(30, len(text))
        if text.index(text[at : at + 2]) == at and text[at : at + 2].isascii()
    )
    last = next(i for i in range(80) if stop in backend.decode(ids[: i + 1]))
    base = services("verify", vocab=320, model=str(tiny_base), seconds_per_round=0.001)
    draft = services("draft", vocab=320, agreement=80)
    beyond: list[Any] = []

    def pace(item: Any) -> None:
        if item.base_len + len(item.append) > len(PROMPT) + last:
            if not beyond:  # nobody but the coordinator sees the end, and has time to
                soon(lambda: base.changes and not base.changes[-1].rounds)
            beyond.append(item)

    base.toy.refuse = pace

    async with client_of(base, draft, link="shm", tokenizer=str(tiny_base)) as client:
        one = (await client.generate(ask(PROMPT, 80, k=k, stopping={"stop": [stop]}))).only
        assert one.finished.reason == pb.FINISH_REASON_STOP_STRING
        assert one.ids == ids[: last + 1]
        assert one.text == text[: text.index(stop)]
        await until(lambda: base.toy.live == draft.toy.live == 0)
    assert len(beyond) == 1
    assert base.free


async def test_granted_rounds_takes_over_k_while_it_runs(services: Make, client_of: Make) -> None:
    base, draft = services("verify"), services("draft", agreement=50)
    seen = Seen()
    changes = {10: 2, 20: 6}
    judged = 0

    def change(item: Any) -> None:
        nonlocal judged
        if item.proposal:
            judged += 1
            if judged in changes:
                seen.runtime.speculation.max_k = changes[judged]
            elif judged - 1 in changes:
                # The coordinator hears of the last round, and has time to speak.
                soon(lambda: [changes[judged - 1]] in [list(one.ks) for one in base.changes])

    base.toy.refuse = change

    async with client_of(base, draft, seen, link="shm") as client:
        one = (await client.generate(ask(PROMPT, 300, k=6))).only
        assert one.ids == fakes.plain(PROMPT, 300)
    rounds = [(number, item.k) for number, items in draft.free for item in items][:40]
    # What is proposed when the word comes is still judged; then it holds, in the same grant.
    assert [k for _, k in rounds] == [6] * 10 + [2] * 10 + [6] * 20
    assert len({number for number, _ in rounds}) == 1
