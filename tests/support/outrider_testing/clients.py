"""A coordinator on the test's own event loop, its client, and what the client asks for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio

from outrider.coordinator.server import service
from outrider.protos import generation_pb2 as pb
from outrider.protos import generation_pb2_grpc as pb_grpc
from outrider.shared.config.schema import CoordinatorConfig


class Result:
    """What one call gave."""

    def __init__(self) -> None:
        self.samples: dict[int, SimpleNamespace] = {}
        self.messages: list[pb.GenerateResponse] = []
        self.error: grpc.aio.AioRpcError | None = None

    def add(self, message: pb.GenerateResponse) -> None:
        self.messages.append(message)
        one = self.samples.setdefault(
            message.sample_index,
            SimpleNamespace(
                started=None, text="", ids=[], origins=[], logprobs=[], finished=None, deltas=0
            ),
        )
        kind = message.WhichOneof("event")
        assert one.finished is None, "nothing comes after Finished"
        if kind == "started":
            assert one.started is None
            one.started = message.started
        else:
            assert one.started is not None, "Started comes first"
        if kind == "delta":
            one.deltas += 1
            one.text += message.delta.text
            one.ids.extend(message.delta.token_ids)
            one.origins.extend(message.delta.origins)
            one.logprobs.extend(message.delta.logprobs)
        elif kind == "finished":
            one.finished = message.finished

    @property
    def only(self) -> Any:
        """The single sample; raises the call's error where there is one."""
        if self.error is not None:
            raise self.error
        (one,) = self.samples.values()
        return one


class Client:
    """A client of the coordinator under test."""

    def __init__(self, channel: grpc.aio.Channel, target: str, stop: asyncio.Event) -> None:
        self.stub: Any = pb_grpc.GenerationStub(channel)
        self.target = target
        self.stop = stop

    async def info(self) -> pb.InfoResponse:
        found: pb.InfoResponse = await self.stub.Info(pb.InfoRequest())
        return found

    async def generate(self, request: pb.GenerateRequest, **options: Any) -> Result:
        """Runs one request to its end; an error is kept in the result."""
        result = Result()
        try:
            async for message in self.stub.Generate(request, **options):
                result.add(message)
        except grpc.aio.AioRpcError as error:
            result.error = error
        return result


@asynccontextmanager
async def coordinator(config: CoordinatorConfig, observer: Any = None) -> AsyncIterator[Client]:
    """Runs a coordinator on this event loop; its client."""
    stop = asyncio.Event()
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(
        service.serve(config, stop=stop, observer=observer, ready=ready.set_result)
    )
    try:
        done, _ = await asyncio.wait((task, ready), return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            await task
        async with grpc.aio.insecure_channel(config.listen) as channel:
            yield Client(channel, config.listen, stop)
    finally:
        stop.set()
        await asyncio.wait((task,))
    await task  # raises what it ended with


def ask(
    ids: list[int],
    n: int = 32,
    *,
    k: int | None = None,
    stopping: dict[str, Any] | None = None,
    output: dict[str, Any] | None = None,
    resume: list[int] | None = None,
    rule: pb.AcceptanceRule = pb.ACCEPTANCE_RULE_UNSPECIFIED,
    salt: str = "",
    **sampling: Any,
) -> pb.GenerateRequest:
    """A request by token ids for ``n`` more; ``sampling``: fields of ``SamplingParameters``."""
    request = pb.GenerateRequest(
        prompt_token_ids=pb.TokenIds(ids=ids),
        sampling=pb.SamplingParameters(**sampling),
        stopping=pb.StopConditions(max_new_tokens=n, **(stopping or {})),
        speculation=pb.SpeculationParameters(k=k, rule=rule),
        output=pb.OutputOptions(**(output or {})),
        cache_salt=salt,
    )
    if resume:
        request.resume_token_ids.ids.extend(resume)
    return request
