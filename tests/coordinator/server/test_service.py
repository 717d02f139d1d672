"""What a client of the public API sees."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc.aio._call import StreamStreamCall
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from outrider.coordinator.requests.validation import derived_seed
from outrider.protos import generation_pb2 as pb
from outrider.protos import generation_pb2_grpc as pb_grpc
from outrider.shared.core.rules import REJECTION
from outrider.shared.core.types import Decoding, ProposeItem, VerifyItem
from outrider_testing import fakes
from outrider_testing.clients import ask
from outrider_testing.waiting import until

Make = Callable[..., Any]
PROMPT = [5, 6, 7, 8]


@pytest.fixture
def text_model(tmp_path: Path) -> Path:
    """A model folder with a byte-level tokenizer of 256 tokens and a chat template."""
    folder = tmp_path / "model"
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return folder


async def test_service_sixteen_requests_at_once_each_get_their_own(
    services: Make, client_of: Make
) -> None:
    base, draft = services("verify"), services("draft", agreement=75)
    rng = random.Random(0)
    cases = []
    for i in range(16):
        prompt = [rng.randrange(300) for _ in range(rng.choice([1, 3, 40, 700]))]
        temperature = rng.choice([0.0, 0.7])
        cases.append((prompt, rng.randrange(1, 80), rng.choice([0, 1, 4, 8, None]), temperature, i))

    async with client_of(base, draft, prefill_chunk=64) as client:
        results = await asyncio.gather(
            *(
                client.generate(ask(prompt, n, k=k, temperature=t, seed=seed))
                for prompt, n, k, t, seed in cases
            )
        )
        for (prompt, n, _, t, seed), result in zip(cases, results, strict=True):
            decoding = Decoding(temperature=t, seed=seed)
            assert result.only.ids == fakes.plain(prompt, n, decoding)
            assert result.only.started.seed == seed
    assert base.toy.live == draft.toy.live == 0
    assert base.toy.used == draft.toy.used == 0


async def test_service_prompts_are_taken_in_by_chunks_on_both_sides(
    services: Make, client_of: Make
) -> None:
    base, draft = services("verify", seconds_per_round=0.002), services("draft", agreement=100)
    prompt = [i % 300 for i in range(500)]

    async with client_of(base, draft, prefill_chunk=64) as client:
        one = (await client.generate(ask(prompt, 400, k=4))).only
        assert one.ids == fakes.plain(prompt, 400)
        # The draft took its chunks in beside the first tokens, and was of use then.
        assert one.finished.speculation.accepted >= 100
    verify = [item for item in base.toy.items if isinstance(item, VerifyItem)]
    assert max(len(item.append) for item in verify) <= 64
    assert [item.extend_only for item in verify[:8]] == [True] * 7 + [False]
    drafted = [item for item in draft.toy.items if isinstance(item, ProposeItem)]
    assert max(len(item.append) for item in drafted) <= 64


async def test_service_running_sequences_go_on_while_a_prompt_is_taken_in(
    services: Make, client_of: Make
) -> None:
    base = services("verify", seconds_per_row=0.0005)

    async with client_of(base, prefill_chunk=32) as client:
        running = asyncio.create_task(client.generate(ask(PROMPT, 400, k=0)))
        await until(lambda: base.toy.rounds > 5)
        await client.generate(ask([1] * 640, 1, k=0))
        running.cancel()
    first = base.toy.items[0].sequence_id
    # Between two chunks of the long prompt the running sequence always had its turn.
    order = [item.sequence_id == first for item in base.toy.items]
    chunks = [i for i, mine in enumerate(order) if not mine]
    assert len(chunks) == 20
    assert all(any(order[a:b]) for a, b in itertools.pairwise(chunks))


async def test_service_cancelled_call_frees_both_sides_within_a_round(
    services: Make, client_of: Make
) -> None:
    base = services("verify", seconds_per_round=0.01)
    draft = services("draft", seconds_per_round=0.002)

    async with client_of(base, draft) as client:
        call = client.stub.Generate(ask(PROMPT, 3000, k=3))
        async for _ in call:
            if base.free:
                break
        gate = base.toy.stand()
        await until(gate.reached.is_set)
        rounds = base.toy.rounds
        call.cancel()
        await until(lambda: base.changes and not base.changes[-1].rounds)
        base.toy.hold = None
        gate.set()
        await until(lambda: base.toy.live == 0 and draft.toy.live == 0)
        assert base.toy.rounds - rounds == 1
        info = await client.info()
        assert (info.running, info.waiting) == (0, 0)
    assert base.toy.used == draft.toy.used == 0


async def test_service_deadline_gives_finished_and_then_the_status(
    services: Make, client_of: Make
) -> None:
    base = services("verify", seconds_per_round=0.01)

    async with client_of(base) as client:
        started = time.monotonic()
        result = await client.generate(ask(PROMPT, 3000), timeout=2.0)
        assert time.monotonic() - started < 0.01 * 3000  # what it would have taken
        assert result.error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        one = result.samples[0]
        assert one.finished.reason == pb.FINISH_REASON_DEADLINE
        assert one.finished.usage.completion_tokens == len(one.ids) > 5
        assert one.ids == fakes.plain(PROMPT, len(one.ids))
        await until(lambda: base.toy.live == 0)
        # A deadline while still waiting for admission.
        base.toy.arena_tokens = 30
        result = await client.generate(ask(PROMPT, 20), timeout=0.3)
        assert result.error.code() in (
            grpc.StatusCode.DEADLINE_EXCEEDED,
            grpc.StatusCode.RESOURCE_EXHAUSTED,
        )


async def test_service_waits_its_turn_when_the_arena_is_full(
    services: Make, client_of: Make
) -> None:
    base = services("verify", arena_tokens=160)  # room for two
    gate = base.toy.stand()

    async with client_of(base) as client:
        calls = []
        for i in range(6):
            calls.append(asyncio.create_task(client.generate(ask([i, 1], 60, k=0))))

            async def all_are_in() -> bool:
                info = await client.info()
                return info.running + info.waiting == len(calls)

            await until(all_are_in)
        assert (await client.info()).waiting == 5
        base.toy.hold = None
        gate.set()
        for i, call in enumerate(calls):
            assert (await call).only.ids == fakes.plain([i, 1], 60)
    # First come, first served.
    began = {item.sequence_id: item.append[0] for item in reversed(base.toy.items)}
    assert [began[one.sequence_id] for one in base.toy.opened] == list(range(6))
    assert base.toy.used == 0


async def test_service_refuses_what_can_never_fit_and_what_the_queue_does_not_hold(
    services: Make, client_of: Make
) -> None:
    base = services("verify", arena_tokens=200, seconds_per_round=0.01)

    async with client_of(base, max_running=1, max_waiting=1) as client:
        result = await client.generate(ask(PROMPT, 500))
        assert result.error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "521" in result.error.details() and "200" in result.error.details()
        running = asyncio.create_task(client.generate(ask(PROMPT, 100)))
        await until(lambda: base.toy.live == 1)
        waiting = asyncio.create_task(client.generate(ask(PROMPT, 1)))

        async def one_waits() -> bool:
            return (await client.info()).waiting == 1

        await until(one_waits)
        result = await client.generate(ask(PROMPT, 1))
        assert result.error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "1 wait (at most 1)" in result.error.details()
        running.cancel()
        assert (await waiting).only.finished


async def test_service_bad_input_has_its_status_and_field_and_the_server_goes_on(
    services: Make, client_of: Make
) -> None:
    base = services("verify")
    bad = [
        (ask([], 5), "prompt_token_ids.ids"),
        (ask([300], 5), "prompt_token_ids.ids[0]"),
        (ask([1] * 4096, 5), "prompt_token_ids.ids"),
        (ask(PROMPT, 0), "stopping.max_new_tokens"),
        (ask(PROMPT, 5, k=17), "speculation.k"),
        (ask(PROMPT, 5, k=-1), "speculation.k"),
        (ask(PROMPT, 5, temperature=float("nan")), "sampling.temperature"),
        (ask(PROMPT, 5, top_p=0.0), "sampling.top_p"),
        (pb.GenerateRequest(prompt="text"), "prompt"),
    ]

    from google.rpc import error_details_pb2, status_pb2

    async with client_of(base) as client:
        for request, field in bad:
            error = (await client.generate(request)).error
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert error.details().startswith(f"{field}: got ")
            trailer = dict(error.trailing_metadata())
            status = status_pb2.Status.FromString(trailer["grpc-status-details-bin"])
            found = error_details_pb2.BadRequest()
            assert any(detail.Unpack(found) for detail in status.details)
            assert found.field_violations[0].field == field
        assert (await client.generate(ask(PROMPT, 5))).only.ids == fakes.plain(PROMPT, 5)


async def test_service_slow_reader_stalls_nobody_and_loses_nothing(
    services: Make, client_of: Make
) -> None:
    base = services("verify", max_positions=1 << 20, arena_tokens=1 << 20)

    async with client_of(base) as client:
        # A reader with a small window, so that what it does not read stays at the server.
        options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16384)]
        channel = grpc.aio.insecure_channel(client.target, options=options)
        slow = pb_grpc.GenerationStub(channel).Generate(
            ask(PROMPT, 1500, k=0, output={"logprobs": 20})
        )
        stream = slow.__aiter__()
        await stream.__anext__()
        # It does not read on; the other one is served meanwhile.
        one = (await client.generate(ask([9, 9], 300, k=0))).only
        assert one.ids == fakes.plain([9, 9], 300)
        await until(lambda: base.toy.live == 0)  # the slow one's work is done as well
        ids: list[int] = []
        deltas = 0
        async for message in stream:
            ids.extend(message.delta.token_ids)
            deltas += message.HasField("delta")
        assert ids == fakes.plain(PROMPT, 1500)
        await channel.close()
        assert deltas < 1000  # what it had not read was merged


async def test_service_samples_are_independent_and_repeatable(
    services: Make, client_of: Make
) -> None:
    base, draft = services("verify"), services("draft")

    async with client_of(base, draft) as client:
        request = ask(PROMPT, 30, temperature=0.8, seed=11, output={"num_samples": 4})
        result = await client.generate(request)
        assert sorted(result.samples) == [0, 1, 2, 3]
        for i, one in result.samples.items():
            seed = 11 if i == 0 else derived_seed(11, i)
            decoding = Decoding(temperature=0.8, seed=seed)
            assert one.ids == fakes.plain(PROMPT, 30, decoding)
            assert one.started.seed == one.finished.seed == seed
        # The seed of a sample, sent again, repeats that sample.
        again = await client.generate(
            ask(PROMPT, 30, temperature=0.8, seed=result.samples[2].started.seed)
        )
        assert again.only.ids == result.samples[2].ids


@pytest.mark.parametrize("k", [0, 3, 7])
async def test_service_stop_tokens_end_the_text_in_the_middle_of_a_block(
    services: Make, client_of: Make, k: int
) -> None:
    whole = fakes.plain(PROMPT, 60)
    at = 17
    token = whole[at]
    first = whole.index(token)
    base = services("verify", eos=(token,))
    draft = services("draft", agreement=100)

    async with client_of(base, draft) as client:
        one = (await client.generate(ask(PROMPT, 60, k=k))).only
        assert one.ids == whole[: first + 1]
        assert one.finished.reason == pb.FINISH_REASON_END_OF_SEQUENCE
        assert one.finished.stop_token_id == token
        assert one.finished.usage.completion_tokens == first + 1
        one = (await client.generate(ask(PROMPT, 60, k=k, stopping={"ignore_eos": True}))).only
        assert one.ids == whole
        stops = {"ignore_eos": True, "stop_token_ids": [whole[9]]}
        one = (await client.generate(ask(PROMPT, 60, k=k, stopping=stops))).only
        assert one.ids == whole[: whole.index(whole[9]) + 1]
        assert one.finished.reason == pb.FINISH_REASON_STOP_TOKEN


async def test_service_text_stop_strings_echo_and_conversation(
    services: Make, client_of: Make, text_model: Path
) -> None:
    base = services("verify", vocab=256, model=str(text_model))
    draft = services("draft", vocab=256, agreement=90)
    backend = Tokenizer.from_file(str(text_model / "tokenizer.json"))

    async with client_of(base, draft, tokenizer=str(text_model)) as client:

        def text_request(**parts: Any) -> pb.GenerateRequest:
            stopping = {"max_new_tokens": 80, **parts.pop("stopping", {})}
            return pb.GenerateRequest(stopping=pb.StopConditions(**stopping), **parts)

        prompt = backend.encode("héllo").ids
        ids = fakes.plain(prompt, 80, vocab=256)
        whole = backend.decode(ids)
        for k in (0, 4):
            speculation = pb.SpeculationParameters(k=k)
            one = (
                await client.generate(text_request(prompt="héllo", speculation=speculation))
            ).only
            assert one.ids == ids
            assert one.text == whole
            assert one.started.prompt_tokens == len(prompt)
            stop = next(
                whole[at : at + 3]
                for at in range(20, len(whole))
                if "\ufffd" not in whole[at : at + 4]
            )
            one = (
                await client.generate(
                    text_request(
                        prompt="héllo",
                        speculation=speculation,
                        stopping={"stop": ["~~~", stop]},
                    )
                )
            ).only
            assert one.text == whole[: whole.index(stop)]
            assert one.finished.reason == pb.FINISH_REASON_STOP_STRING
            assert one.finished.stop_string == stop
            count = len(one.ids)
            assert one.finished.usage.completion_tokens == count
            assert one.ids == ids[:count]
            # The last token is the one that completed the stop string.
            assert stop in backend.decode(ids[:count])
            assert stop not in backend.decode(ids[: count - 1])
        echoed = await client.generate(
            text_request(prompt="héllo", output=pb.OutputOptions(echo=True))
        )
        assert echoed.only.text == "héllo" + whole
        talk = pb.Conversation(messages=[pb.ChatMessage(role="user", content="hi")])
        one = (await client.generate(text_request(conversation=talk))).only
        rendered = backend.encode("<user>hi\n<assistant>").ids
        assert one.ids == fakes.plain(rendered, 80, vocab=256)


async def test_service_resume_sends_exactly_the_rest(
    services: Make, client_of: Make, text_model: Path
) -> None:
    base = services("verify", vocab=256, model=str(text_model))
    draft = services("draft", vocab=256)

    async with client_of(base, draft, tokenizer=str(text_model)) as client:

        def request(resume: list[int]) -> pb.GenerateRequest:
            made = pb.GenerateRequest(
                prompt="abc",
                sampling=pb.SamplingParameters(temperature=0.9, seed=5),
                stopping=pb.StopConditions(max_new_tokens=40, stop=["never to be seen"]),
                output=pb.OutputOptions(echo=True),
            )
            made.resume_token_ids.ids.extend(resume)
            return made

        whole = await client.generate(request([]))
        text = whole.only.text
        for cut in (1, 13, 39):
            rest = (await client.generate(request(whole.only.ids[:cut]))).only
            assert rest.ids == whole.only.ids[cut:]
            assert text.endswith(rest.text)
            assert rest.finished.usage.completion_tokens == 40 - cut
        done = (await client.generate(request(whole.only.ids))).only
        assert done.ids == []
        assert done.finished.reason == pb.FINISH_REASON_MAX_TOKENS
    assert base.toy.live == 0


async def test_service_logprobs_pass_through_for_each_token(
    services: Make, client_of: Make
) -> None:
    base, draft = services("verify"), services("draft", agreement=90)

    async with client_of(base, draft) as client:
        for k in (0, 5):
            one = (await client.generate(ask(PROMPT, 30, k=k, output={"logprobs": 3}))).only
            assert len(one.logprobs) == len(one.ids) == 30
            for token, got in zip(one.ids, one.logprobs, strict=True):
                wanted = fakes.toy_logprobs(token, 3)
                assert got.logprob == wanted.logprob
                assert [(t.token_id, t.logprob) for t in got.top] == list(wanted.top)
        one = (await client.generate(ask(PROMPT, 5))).only
        assert not one.logprobs


async def test_service_origins_and_statistics_agree(services: Make, client_of: Make) -> None:
    base = services("verify", seconds_per_round=0.002)
    draft = services("draft", agreement=80, seconds_per_round=0.001)

    async with client_of(base, draft) as client:
        one = (await client.generate(ask(PROMPT, 120, k=4))).only
        figures = one.finished.speculation
        count = {origin: one.origins.count(origin) for origin in set(one.origins)}
        assert sum(count.values()) == 120
        assert count[pb.TOKEN_ORIGIN_ACCEPTED] == figures.accepted
        assert figures.accepted == sum(figures.accepted_by_position)
        assert figures.proposed == sum(figures.proposed_by_position)
        assert figures.acceptance_rate == pytest.approx(figures.accepted / figures.proposed)
        assert figures.mean_accepted_length == pytest.approx(120 / figures.rounds)
        assert figures.rounds == 120 - figures.accepted
        # Never more than is left: the last proposal leaves room for the base's own token.
        assert figures.proposed_by_position[3] <= figures.proposed_by_position[0]
        seconds = figures.seconds
        parts = seconds.queue + seconds.prefill + seconds.draft + seconds.verify
        # What is missing is the time between the rounds, more of it on a busy machine.
        rest = seconds.total - (parts + seconds.overhead)
        assert -0.01 * seconds.total <= rest <= 0.05 * seconds.total + 0.1
        assert seconds.verify >= 0.002 * (figures.rounds - 1)
        assert seconds.draft >= 0.001 * (figures.rounds - 2)


async def test_service_rules_and_seeds_reach_the_services(services: Make, client_of: Make) -> None:
    base, draft = services("verify"), services("draft")

    async with client_of(base, draft) as client:
        await client.generate(
            ask(PROMPT, 5, k=2, temperature=0.5, seed=3, rule=pb.ACCEPTANCE_RULE_REJECTION)
        )
    for toy in (base.toy, draft.toy):
        (opened,) = toy.opened
        assert opened.decoding.rule is REJECTION
        assert opened.decoding.seed == 3
        assert opened.decoding.prompt_len == len(PROMPT)
        assert opened.capacity == len(PROMPT) + 5 + 17


async def test_service_info_describes_models_limits_and_load(
    services: Make, client_of: Make
) -> None:
    base, draft = services("verify", seconds_per_round=0.005), services("draft", max_k=4)

    async with client_of(base, draft, default_k=3, default_max_new_tokens=77) as client:
        call = asyncio.create_task(client.generate(ask(PROMPT, 500)))
        await until(lambda: base.toy.live == 1)
        info = await client.info()
        assert info.base.architecture == info.draft.architecture == "Toy"
        assert info.base.arena_tokens_used == base.toy.used > 0
        assert (info.default_k, info.default_max_new_tokens) == (3, 77)
        assert info.running == 1
        assert (info.link, info.link_reason) == ("shm", "")
        await until(lambda: bool(draft.toy.items))
        call.cancel()
    # The draft allows less than a request may ask for: proposals stay within it.
    assert max(item.k for item in draft.toy.items) <= 4


async def test_service_drains_on_stop_and_says_goodbye(
    services: Make, client_of: Make, caplog: pytest.LogCaptureFixture
) -> None:
    base, draft = services("verify", seconds_per_round=0.002), services("draft")

    async with client_of(base, draft, drain_seconds=10.0) as client:
        call = asyncio.create_task(client.generate(ask(PROMPT, 100)))
        await until(lambda: base.toy.rounds > 3)
        client.stop.set()
        result = await call
    assert result.only.ids == fakes.plain(PROMPT, 100)
    assert not [record for record in caplog.records if "goodbye" in record.message]


async def test_service_says_goodbye_though_a_message_is_on_its_way_out(
    services: Make, client_of: Make, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    """The last message frees what the request held; gRPC cancels a call with a write of it."""
    original = StreamStreamCall.write
    slow = asyncio.Event()
    begun = asyncio.Event()

    async def write(call: Any, request: Any) -> None:
        await original(call, request)
        if slow.is_set() and request.close:
            begun.set()
            try:
                await asyncio.sleep(0.2)
            except asyncio.CancelledError:
                call.cancel()
                raise

    monkeypatch.setattr(StreamStreamCall, "write", write)
    base, draft = services("verify"), services("draft")
    async with client_of(base, draft, drain_seconds=10.0) as client:
        slow.set()
        call = asyncio.create_task(client.generate(ask(PROMPT, 30)))
        await asyncio.wait_for(begun.wait(), 60)
        client.stop.set()
        assert (await call).error is None
    assert not [record for record in caplog.records if "without goodbye" in record.message]


async def test_service_many_short_requests_leave_nothing_behind(
    services: Make, client_of: Make
) -> None:
    base, draft = services("verify"), services("draft")

    async with client_of(base, draft, max_running=8) as client:
        for _ in range(10):
            await asyncio.gather(*(client.generate(ask([i], 3)) for i in range(30)))
        info = await client.info()
        assert (info.running, info.waiting) == (0, 0)
        await until(lambda: base.toy.live == draft.toy.live == 0)
    assert base.toy.used == draft.toy.used == 0
