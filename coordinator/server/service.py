"""``outrider.v1.Generation``: clients' calls in, streams of text out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from importlib import metadata
from typing import Any

import grpc
import grpc.aio

from outrider.coordinator.requests import validation
from outrider.coordinator.requests.running import Job
from outrider.coordinator.requests.text.stopping import FinishReason
from outrider.coordinator.rounds.controller.choose_k import Speculation
from outrider.coordinator.server import profile_rpc, runtime
from outrider.coordinator.server.runtime import Runtime
from outrider.coordinator.services.connection import DraftConnection, VerifyConnection
from outrider.coordinator.telemetry.records import Observer
from outrider.protos import generation_pb2 as pb
from outrider.protos import generation_pb2_grpc as pb_grpc
from outrider.shared.config.schema import CoordinatorConfig
from outrider.shared.core.errors import ServiceUnavailable
from outrider.shared.process.grpc_server import AioServer

NAME = "outrider.v1.Generation"
HEALTH_SECONDS = 0.25
WRITE_SECONDS = 0.25e-3
"""Time of the event loop that one message may take: with many requests at once, each sends
fewer and larger deltas, so that sending never holds up the rounds."""
LEAST_PACE, MOST_PACE = 2e-3, 40e-3
LONG_TEXT = 1 << 14
"""Characters above which a prompt is tokenized beside the event loop."""


class GenerationServicer(pb_grpc.GenerationServicer):
    """Implements the public API over a runtime."""

    def __init__(self, coordinator: Runtime) -> None:
        self._runtime = coordinator

    # A coroutine that writes, not an async generator, which is the only kind that the stubs know:
    # one hop of the event loop less for each message.
    async def Generate(  # type: ignore[override]
        self, request: pb.GenerateRequest, context: Any
    ) -> None:
        """Streams one request; see generation.proto."""
        arrived_ns = self._runtime.clock()
        checked = await self._validate(request, _traceparent(context))
        if self._runtime.observer.follows:
            self._runtime.observer.request_started(checked.request_id, checked.traceparent)
        loop = self._runtime.loop
        job = loop.submit(checked, arrived_ns)
        deadline = self._arm_deadline(job, context)
        try:
            while not job.done:
                await job.changed.wait()
                job.changed.clear()
                for message in job.drain():
                    await context.write(message)
                if job.error is not None:
                    raise job.error
                pace = min(WRITE_SECONDS * loop.running, MOST_PACE)
                if pace > LEAST_PACE and not job.done:
                    await asyncio.sleep(pace)  # what comes meanwhile is sent as one delta
        finally:
            # Also when the client cancelled or went away: its extents are freed with the next
            # round.
            if deadline is not None:
                deadline.cancel()
            loop.end(job, FinishReason.CANCELLED)
        if _past_deadline(job):
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the request's deadline passed")

    async def Info(self, request: pb.InfoRequest, context: Any) -> pb.InfoResponse:
        """Describes models, limits and links; figures of the arena are fresh."""
        coordinator = self._runtime
        limits = coordinator.limits
        connections: list[VerifyConnection | DraftConnection] = [coordinator.verify_connection]
        if coordinator.draft_connection is not None and coordinator.draft_connection.up:
            connections.append(coordinator.draft_connection)
        services = await asyncio.gather(*(connection.describe() for connection in connections))
        caches = coordinator.loop.prefix_caches
        response = pb.InfoResponse(
            version=metadata.version("outrider"),
            base=services[0].model,
            default_k=coordinator.speculation.k if limits.default_k is None else limits.default_k,
            max_k=limits.max_k,
            default_max_new_tokens=limits.default_max_new_tokens,
            running=coordinator.loop.running,
            waiting=coordinator.loop.waiting,
            link=coordinator.mailbox_setup.link,
            link_reason=coordinator.mailbox_setup.reason,
            base_cache=caches["verify"].describe(),
            draft_cache=caches["draft"].describe() if "draft" in caches else None,
        )
        if limits.default_k is None and coordinator.draft_connection is not None:
            response.speculation.CopyFrom(_speculation(coordinator.speculation))
        if len(services) > 1:
            response.draft.CopyFrom(services[1].model)
        return response

    async def Profile(self, request: pb.ProfileRequest, context: Any) -> pb.ProfileResponse:
        """Tells the rounds of a recent request."""
        return await profile_rpc.answer(self._runtime, request.request_id)

    async def _validate(
        self, request: pb.GenerateRequest, traceparent: str
    ) -> validation.GenerationRequest:
        coordinator = self._runtime
        arguments = (request, coordinator.limits, coordinator.tokenizer)
        size = len(request.prompt) + sum(len(m.content) for m in request.conversation.messages)
        if size > LONG_TEXT or request.WhichOneof("input") == "conversation":
            return await asyncio.to_thread(validation.validate, *arguments, traceparent=traceparent)
        return validation.validate(*arguments, traceparent=traceparent)

    def _arm_deadline(self, job: Job, context: Any) -> asyncio.TimerHandle | None:
        """Ends the request a little before gRPC would cut it off, so that the client gets its
        Finished with usage and statistics, and then DEADLINE_EXCEEDED."""
        remaining = context.time_remaining()
        if remaining is None:
            return None
        margin = min(0.05, 0.1 * remaining)
        return asyncio.get_running_loop().call_later(
            max(0.0, remaining - margin), self._runtime.loop.end, job, FinishReason.DEADLINE
        )


def _speculation(speculation: Speculation) -> pb.SpeculationState:
    choice = speculation.choice
    return pb.SpeculationState(
        measured=speculation.costs.measured,
        sequences=len(choice.ks),
        k=speculation.k,
        reason=choice.why,
        acceptance=speculation.everyone.rate,
        outlook=[
            pb.KOutlook(
                k=one.k,
                draft_seconds=one.draft_seconds,
                rest_seconds=one.rest_seconds,
                tokens_per_second=one.rate,
            )
            for one in speculation.outlook()
        ],
    )


async def serve(
    config: CoordinatorConfig,
    *,
    stop: asyncio.Event,
    hurry: asyncio.Event | None = None,
    observer: Observer | None = None,
    progress: Callable[[str], None] = lambda text: None,
    ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Runs a coordinator until ``stop`` is set, then drains; ``hurry`` cuts the drain short.

    ``ready`` is told the address once requests are welcome. Raises ``ConfigError`` when it can't
    listen or the parts do not fit, ``ServiceUnavailable`` when the base can't be reached.
    """
    gate = _Gate()
    # Bound before anything else, so that a port in use is told at once.
    add = pb_grpc.add_GenerationServicer_to_server
    server = AioServer(config, lambda grpc_server: add(gate, grpc_server), [NAME])
    await server.start()
    try:
        starting = runtime.running(config, observer=observer, progress=progress)
        async with starting as coordinator:
            coordinator.observer.attach(coordinator)
            gate.open(GenerationServicer(coordinator))
            await server.serving()
            ready(str(server.address))
            await _mirror_health(server, coordinator, stop)
            # Calls that run go on while the runtime still does; then it takes leave.
            await _drained(server, config.drain_seconds, hurry)
    finally:
        await server.drain(0)


async def _mirror_health(server: AioServer, coordinator: Runtime, stop: asyncio.Event) -> None:
    """Until ``stop``: healthy while the base is there."""
    healthy = True
    while not stop.is_set():
        up = coordinator.verify_connection.up
        if up != healthy:
            healthy = up
            await server.serving(up)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HEALTH_SECONDS):
                await stop.wait()


async def _drained(server: AioServer, seconds: float, hurry: asyncio.Event | None) -> None:
    """Refuses new calls and waits for running ones, until ``seconds`` or ``hurry``."""
    draining = asyncio.create_task(server.drain(seconds))
    hurrying = asyncio.create_task((hurry or asyncio.Event()).wait())
    try:
        await asyncio.wait((draining, hurrying), return_when=asyncio.FIRST_COMPLETED)
        if not draining.done():
            await server.drain(0)
        await draining
    finally:
        hurrying.cancel()


class _Gate(pb_grpc.GenerationServicer):
    """Answers UNAVAILABLE until the runtime is there."""

    def __init__(self) -> None:
        self._servicer: GenerationServicer | None = None

    def open(self, servicer: GenerationServicer) -> GenerationServicer:
        """From now on ``servicer`` answers."""
        self._servicer = servicer
        return servicer

    async def Generate(  # type: ignore[override]
        self, request: pb.GenerateRequest, context: Any
    ) -> None:
        """Streams one request."""
        await self._ready().Generate(request, context)

    async def Info(self, request: pb.InfoRequest, context: Any) -> pb.InfoResponse:
        """Describes the coordinator."""
        return await self._ready().Info(request, context)

    async def Profile(self, request: pb.ProfileRequest, context: Any) -> pb.ProfileResponse:
        """Tells the rounds of a recent request."""
        return await self._ready().Profile(request, context)

    def _ready(self) -> GenerationServicer:
        if self._servicer is None:
            raise ServiceUnavailable("the coordinator is still connecting to the models")
        return self._servicer


def _traceparent(context: Any) -> str:
    """The W3C trace context that the client sent, or empty."""
    for key, value in context.invocation_metadata() or ():
        if key == "traceparent":
            return str(value)
    return ""


def _past_deadline(job: Job) -> bool:
    return any(
        sample.output.finish is not None and sample.output.finish.reason is FinishReason.DEADLINE
        for sample in job.samples
    )
