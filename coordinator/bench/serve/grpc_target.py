"""A coordinator of ours under measurement, through the public API."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict

import grpc

from outrider.coordinator.bench.serve.answer import Answer, RequestFailed
from outrider.coordinator.bench.serve.traffic import PlannedRequest
from outrider.coordinator.bench.workload import generate_request
from outrider.protos import generation_pb2 as pb
from outrider.protos import generation_pb2_grpc as rpc
from outrider.shared.core.errors import ServiceUnavailable
from outrider.shared.core.model_facts import read_description
from outrider.shared.process.grpc_server import (
    authorization,
    channel_credentials,
    client_channel,
    client_options,
)


class GrpcTarget:
    """Streams from ``Generation.Generate``."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        token: str | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        ignore_eos: bool = True,
        k: int | None = None,
    ) -> None:
        """``token``: the bearer token asked for; ``k``: None is the server's choice."""
        self._stub = rpc.GenerationStub(channel)
        self._metadata = authorization(token)
        self._temperature, self._seed = temperature, seed
        self._ignore_eos, self._k = ignore_eos, k

    async def send(self, request: PlannedRequest, index: int, answer: Answer) -> None:
        """See ``Target``."""
        asked = generate_request(
            request.prompt,
            max_new_tokens=request.max_new_tokens,
            temperature=self._temperature,
            seed=self._seed + index,
            ignore_eos=self._ignore_eos,
            k=self._k,
        )
        try:
            async for message in self._stub.Generate(asked, metadata=self._metadata):
                event = message.WhichOneof("event")
                if event == "delta" and message.delta.token_ids:
                    answer.message()
                elif event == "finished":
                    _finish(message.finished, answer)
        except grpc.aio.AioRpcError as error:
            raise RequestFailed(error.code().name, error.details() or "") from error
        if answer.output_tokens is None:
            raise RequestFailed("ended early", "the stream ended without its last message")

    async def describe(self) -> Mapping[str, object]:
        """See ``Target``. Raises ``ServiceUnavailable`` where nothing answers."""
        try:
            info = await self._stub.Info(pb.InfoRequest(), metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise ServiceUnavailable(
                f"the coordinator does not answer: {error.code().name}: {error.details()}"
            ) from error
        return {
            "api": "outrider.v1",
            "base": asdict(read_description(info.base)),
            "draft": asdict(read_description(info.draft)) if info.HasField("draft") else None,
            "link": info.link,
        }


def _finish(finished: pb.Finished, answer: Answer) -> None:
    answer.prompt_tokens = finished.usage.prompt_tokens
    answer.output_tokens = finished.usage.completion_tokens
    answer.rounds = finished.speculation.rounds
    answer.proposed = finished.speculation.proposed
    answer.accepted = finished.speculation.accepted


@asynccontextmanager
async def open_grpc(target: str, ca: str | None = None) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a coordinator; ``ca``: PEM file of its CA, which turns TLS on."""
    async with client_channel(target, channel_credentials(ca), client_options()) as channel:
        yield channel
