"""Both kinds of server under one client: over gRPC and over HTTP, answers, counts and failures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.coordinator.bench.serve.drive import LevelRun, Target, drive
from outrider.coordinator.bench.serve.grpc_target import GrpcTarget, open_grpc
from outrider.coordinator.bench.serve.openai_target import OpenAITarget, first_model, open_http
from outrider.coordinator.bench.serve.server_sent_events import EventReader
from outrider.coordinator.bench.serve.traffic import PlannedRequest
from outrider.shared.core.errors import ConfigError, ServiceUnavailable
from outrider_testing.openai_server import OpenAIServer, openai_server

IDS = tuple(range(16, 24))


async def driven(
    target: Target, prompts: list[Any], tokens: int = 6, concurrency: int = 1, timeout: float = 60.0
) -> LevelRun:
    return await drive(
        target,
        [PlannedRequest(prompt, tokens) for prompt in prompts],
        concurrency=concurrency,
        timeout=timeout,
        stop=asyncio.Event(),
    )


# --- server-sent events ------------------------------------------------------------------------


@given(st.integers(0, 60), st.integers(0, 60), st.sampled_from([b"\n", b"\r\n"]))
def test_events_are_the_same_however_the_body_is_cut(first: int, second: int, end: bytes) -> None:
    body = end.join(
        [b": ping", b"", b"event: x", 'data: {"a": "ü"}'.encode(), b"", b"data:one", b"data:  two"]
    )
    body += end + end
    begin, stop = sorted((first, second))
    reader = EventReader()
    found = [
        event
        for piece in (body[:begin], body[begin:stop], body[stop:])
        for event in reader.push(piece)
    ]
    assert found == ['{"a": "ü"}', "one\n two"]


# --- HTTP --------------------------------------------------------------------------------------


async def over_http(
    server: OpenAIServer, prompts: list[Any], api: str = "completions", **options: Any
) -> LevelRun:
    async with open_http({"Authorization": "Bearer secret"}) as session:
        target = OpenAITarget(session, server.url, api, {"model": "small", "temperature": 0.5})
        return await driven(target, prompts, **options)


async def test_completions_are_asked_for_and_counted() -> None:
    with openai_server() as server:
        run = await over_http(server, ["def f():", IDS])
    text, ids = server.bodies
    assert text == {
        "model": "small", "prompt": "def f():", "max_tokens": 6, "temperature": 0.5,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert ids["prompt"] == list(IDS)
    assert server.headers[0]["Authorization"] == "Bearer secret"
    for one in run.answers:
        assert one.completed and len(one.messages) == 6
        assert (one.prompt_tokens, one.output_tokens) == (7, 6)
        assert one.sent <= one.messages[0] <= one.messages[-1] <= (one.ended or 0.0)
        assert sorted(one.messages) == one.messages


async def test_chat_counts_no_token_for_the_role() -> None:
    with openai_server() as server:
        run = await over_http(server, ["Hello", IDS], "chat")
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "Hello"}]
    (words,) = server.bodies[1]["messages"]
    assert len(words["content"].split()) == len(IDS)
    assert [len(one.messages) for one in run.answers] == [6, 6]


async def test_tokens_are_the_servers_count_where_messages_hold_several() -> None:
    with openai_server(per_event=4) as server:
        (one,) = (await over_http(server, [IDS])).answers
    assert len(one.messages) == 2 and one.tokens == 6
    with openai_server(per_event=4, usage=False) as server:
        (one,) = (await over_http(server, [IDS])).answers
    assert one.completed and one.output_tokens is None and one.tokens == 2


async def test_http_failures_are_told_apart() -> None:
    with openai_server({0: "busy", 1: "cut", 2: "error", 4: "hang"}) as server:
        # The last one, the fifth, is given up; those before it have all the time they need.
        run = await over_http(server, [IDS] * 4)
        last = await over_http(server, [IDS], timeout=0.2)
    found = [(one.failure, one.failure_message) for one in run.answers]
    assert found == [
        ("HTTP 503", "too many requests"),
        ("ended early", "the stream ended without a reason to finish"),
        ("error in the stream", "the engine died"),
        (None, ""),
    ]
    assert last.answers[0].failure == "timeout"


async def test_server_that_is_away_is_a_failure_of_each_request() -> None:
    with openai_server() as server:
        pass
    run = await over_http(server, [IDS, IDS])
    assert [one.failure for one in run.answers] == ["no connection"] * 2


async def test_http_concurrency_reaches_the_server() -> None:
    with openai_server({0: "hang", 1: "hang", 2: "hang"}) as server:

        async def release() -> None:
            while server.running < 3:
                await asyncio.sleep(0.005)
            server.release.set()

        run, _ = await asyncio.gather(over_http(server, [IDS] * 9, concurrency=3), release())
    assert server.most_running == 3 and all(one.completed for one in run.answers)


async def test_first_model_is_the_first_that_the_server_lists() -> None:
    async with open_http({}) as session:
        with openai_server() as server:
            assert await first_model(session, server.url) == "small"
            with pytest.raises(ConfigError, match=r"--model: .*/nothing/v1/models names none"):
                await first_model(session, f"{server.url}/nothing")
        with pytest.raises(ServiceUnavailable, match="does not answer"):
            await first_model(session, server.url)


# --- gRPC --------------------------------------------------------------------------------------


async def test_grpc_answers_are_counted(
    client_of: Callable[..., Any], services: Callable[..., Any]
) -> None:
    async with (
        client_of(services("verify"), services("draft", agreement=90)) as client,
        open_grpc(client.target) as channel,
    ):
        run = await driven(GrpcTarget(channel, k=3), [IDS] * 6, tokens=20, concurrency=3)
        described = await GrpcTarget(channel).describe()
    assert described["api"] == "outrider.v1" and described["base"] and described["draft"]
    for one in run.answers:
        assert one.completed and (one.prompt_tokens, one.output_tokens) == (8, 20)
        # A round's tokens come together, and there were fewer rounds than tokens.
        assert 1 <= len(one.messages) <= 20 and one.rounds < 20
        assert 0 < one.accepted <= one.proposed


async def test_grpc_failures_are_told_apart(
    client_of: Callable[..., Any], services: Callable[..., Any]
) -> None:
    async with (
        client_of(services("verify"), grant_rounds=0) as client,
        open_grpc(client.target) as channel,
    ):
        run = await driven(GrpcTarget(channel), [IDS, (10**6,), IDS], tokens=5)
        assert [one.failure for one in run.answers] == [None, "INVALID_ARGUMENT", None]
        assert "prompt_token_ids" in run.answers[1].failure_message
    async with open_grpc(client.target) as channel:
        run = await driven(GrpcTarget(channel), [IDS])
        assert run.answers[0].failure == "UNAVAILABLE"
        with pytest.raises(ServiceUnavailable, match="does not answer: UNAVAILABLE"):
            await GrpcTarget(channel).describe()
