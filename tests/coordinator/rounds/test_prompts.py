"""Prompts beside running streams: who waits for whom, told by rounds and rows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from outrider.coordinator.rounds.prompt_budget import LEAST_ROWS
from outrider.coordinator.telemetry.records import NoObserver, RoundRecord
from outrider.protos import generation_pb2 as pb
from outrider_testing import engines, fakes
from outrider_testing.clients import ask
from outrider_testing.waiting import until

Make = Callable[..., Any]
SHORT = [5, 6, 7, 8]
LONG = [i % 250 for i in range(1500)]
LENGTHS = ((3, 200), (7, 1), (11, 90), (13, 20), (17, 450))
"""Of prompts, each with a number of its own."""


class Seen(NoObserver):
    """Keeps the records of rounds."""

    enabled = True

    def __init__(self) -> None:
        self.rounds: list[RoundRecord] = []

    def round(self, record: RoundRecord) -> None:
        self.rounds.append(record)


@contextmanager
def standing(toy: fakes.Toy, of: Callable[[Any], bool]) -> Iterator[fakes.Gate]:
    """Rounds of ``toy`` with an item of which that is so hang to the end of the block."""
    gate = fakes.Gate()

    def hang(item: Any) -> None:
        if of(item):
            gate.wait(60)

    toy.refuse = hang
    try:
        yield gate
    finally:
        gate.set()
        toy.refuse = lambda item: None


async def test_prompts_a_running_stream_goes_on_in_every_round_of_a_long_prompt(
    services: Make, client_of: Make
) -> None:
    base = services("verify", seconds_per_row=1e-3)
    seen = Seen()
    async with client_of(base, observer=seen, prefill_delay_seconds=1e-9) as client:
        stream = asyncio.create_task(client.generate(ask(SHORT, 400)))
        await until(lambda: base.free)
        one = (await client.generate(ask(LONG, 8))).only
        assert one.ids == fakes.plain(LONG, 8)
        assert (await stream).only.ids == fakes.plain(SHORT, 400)
    rounds = [[(part.rows, part.emitted) for part in record.sequences] for record in seen.rounds]
    beside = [parts for parts in rounds if len(parts) == 2 and parts[1][0] > 1]
    # The least number of rows each, for they take longer than they may; the stream has its token.
    assert len(beside) == -(-len(LONG) // LEAST_ROWS)
    assert [parts[0] for parts in beside] == [(1, 1)] * len(beside)
    assert [parts[1] for parts in beside[:-1]] == [(LEAST_ROWS, 0)] * (len(beside) - 1)
    assert sum(parts[1][0] for parts in beside) == len(LONG)


async def test_prompts_go_as_one_where_nobody_decodes(services: Make, client_of: Make) -> None:
    base = services("verify")
    seen = Seen()
    settings = {"prefill_delay_seconds": 60.0, "prefix_cache": 0}
    async with client_of(base, observer=seen, **settings) as client:
        await client.generate(ask(LONG, 1))
        await client.generate(ask(LONG, 1))
    assert [record.verify.rows for record in seen.rounds] == [512, 988, 1500]


async def test_prompts_that_arrive_during_a_round_share_the_next_one(
    services: Make, client_of: Make
) -> None:
    base = services("verify")
    seen = Seen()
    gate = base.toy.stand()
    prompts = [[number] * 64 for number in range(32)]
    async with client_of(base, observer=seen, prefill_delay_seconds=60.0) as client:
        first = asyncio.create_task(client.generate(ask(prompts[0], 5)))
        await until(gate.reached.is_set)
        others = []
        for number, prompt in enumerate(prompts[1:], 1):
            others.append(asyncio.create_task(client.generate(ask(prompt, 5))))
            while (await client.info()).waiting < number:
                pass
        gate.set()
        for prompt, one in zip(prompts, [await first, *await asyncio.gather(*others)], strict=True):
            assert one.only.ids == fakes.plain(prompt, 5)
    chunks = [[part.rows for part in record.sequences if part.rows > 1] for record in seen.rounds]
    assert [rows for rows in chunks if rows] == [[64], [64] * 31]


async def test_prompts_first_tokens_wait_for_no_draft(services: Make, client_of: Make) -> None:
    """The draft stands still in the prompt of one request; all go on, others begin and end."""
    base = services("verify", seconds_per_round=0.002)
    draft = services("draft", agreement=100)
    settings = {"draft_patience_seconds": 600.0, "draft_timeout_seconds": 600.0}
    seen = Seen()
    written: list[bool] = []

    def of_long(item: Any) -> bool:
        if len(item.append) < 100:
            return False
        # What the base was asked for it before the draft was.
        key, epoch = item.sequence_id, item.epoch
        asked = [one for one in base.toy.items if (one.sequence_id, one.epoch) == (key, epoch)]
        written.append(any(not one.extend_only for one in asked))
        return True

    async with client_of(base, draft, seen, **settings) as client:
        with standing(draft.toy, of_long) as gate:
            stream = asyncio.create_task(client.generate(ask(SHORT, 3000, k=4)))
            await until(lambda: draft.free)
            slow = asyncio.create_task(client.generate(ask(LONG, 2000, k=4)))
            await until(gate.reached.is_set)
            assert written == [True]
            for prompt in (SHORT[:1], SHORT, LONG):
                one = (await client.generate(ask(prompt, 6, k=4))).only
                assert one.ids == fakes.plain(prompt, 6)
                assert one.finished.speculation.proposed == 0
            assert not (stream.done() or slow.done())
            behind = len(seen.rounds)
        # The draft is itself again: all have proposals, the one with the long prompt, too.
        for request, prompt, count in ((slow, LONG, 2000), (stream, SHORT, 3000)):
            one = (await request).only
            assert one.ids == fakes.plain(prompt, count)
            assert one.finished.speculation.accepted > 0
    assert any(len(record.sequences) > 1 for record in seen.rounds[:behind])


async def test_prompts_that_wait_for_proposals_let_others_run(
    services: Make, client_of: Make
) -> None:
    """Under `rejection` tokens depend on which rounds have a proposal: it waits, alone."""
    base, draft = services("verify"), services("draft")
    settings = {"draft_patience_seconds": 600.0, "draft_timeout_seconds": 600.0}
    rule = pb.ACCEPTANCE_RULE_REJECTION
    request = ask(LONG, 6, k=2, rule=rule, temperature=1.0, seed=3)
    async with client_of(base, draft, **settings) as client:
        with standing(draft.toy, lambda item: len(item.append) > 100) as gate:
            held = asyncio.create_task(client.generate(request))
            await until(gate.reached.is_set)
            one = (await client.generate(ask(SHORT, 30, k=2))).only
            assert one.ids == fakes.plain(SHORT, 30)
            assert not held.done()
        assert (await held).only.finished is not None


@pytest.mark.parametrize("delay", [1e-9, 60.0])
async def test_prompts_cut_by_time_change_no_token(
    model_pair: SimpleNamespace, client_of: Make, delay: float
) -> None:
    """Real models: prompts of all lengths at once, in many small pieces and in few large ones."""
    prompts = [[(number * i + 5) % 300 for i in range(length)] for number, length in LENGTHS]
    settings = {"tokenizer": str(model_pair.folder), "prefill_delay_seconds": delay}
    async with client_of(model_pair.verify, model_pair.draft, **settings) as client:
        wanted = [(await client.generate(ask(one, 24, k=0))).only.ids for one in prompts]
        made = await asyncio.gather(*(client.generate(ask(one, 24, k=3)) for one in prompts))
    assert [one.only.ids for one in made] == wanted
    model = AutoModelForCausalLM.from_pretrained(model_pair.folder, dtype=torch.float32)
    assert wanted == [engines.reference(model, one, 24) for one in prompts]
