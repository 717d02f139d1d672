"""``Generation.Profile``: what each round of a recent request took."""

from __future__ import annotations

import asyncio
from typing import Any

from outrider.coordinator.services.connection import DraftConnection, VerifyConnection
from outrider.coordinator.telemetry.recent_rounds import Kept, RoundsKept
from outrider.coordinator.telemetry.records import RoundRecord, SequenceRound, ServiceTiming
from outrider.protos import generation_pb2 as pb
from outrider.shared.core.errors import OutriderError
from outrider.shared.core.resident_memory import resident_bytes

LATE_SECONDS = 1.0
"""How long the last records of a request may be on their way after its last message."""


class NotKept(OutriderError):
    """The coordinator does not keep profiles."""

    status = "FAILED_PRECONDITION"


class UnknownRequest(OutriderError):
    """The request is not among the recent ones."""

    status = "NOT_FOUND"


async def answer(runtime: Any, request_id: str) -> pb.ProfileResponse:
    """The answer for ``request_id``; ``runtime`` is a ``Runtime``."""
    keeper: RoundsKept | None = getattr(runtime.observer, "kept", None)
    if keeper is None:
        raise NotKept("this coordinator keeps no profiles; start it with telemetry.profile = true")
    until = asyncio.get_running_loop().time() + LATE_SECONDS
    while (kept := keeper.get(request_id)) is not None and kept.request is None:
        if asyncio.get_running_loop().time() > until:
            break
        await asyncio.sleep(0.01)
    if kept is None:
        raise UnknownRequest(f"request_id: got {request_id!r}, which is not a recent request")
    response = _response(kept)
    response.coordinator_resident_bytes = resident_bytes()
    response.link = runtime.mailbox_setup.link
    response.base.CopyFrom(await _service(runtime.verify_connection))
    if runtime.draft_connection is not None and runtime.draft_connection.info is not None:
        response.draft.CopyFrom(await _service(runtime.draft_connection))
    return response


def _response(kept: Kept) -> pb.ProfileResponse:
    made = pb.ProfileResponse(rounds=[_round(*one) for one in kept.rounds])
    request = kept.request
    if request is not None:
        made.arrived_ns = request.arrived_ns
        made.admitted_ns = request.admitted_ns
        made.first_token_ns = request.first_token_ns
        made.finished_ns = request.finished_ns
    made.trace_id = kept.trace_id
    return made


def _round(record: RoundRecord, one: SequenceRound) -> pb.RoundProfile:
    return pb.RoundProfile(
        round=record.round,
        started_ns=record.started_ns,
        finished_ns=record.finished_ns,
        draft=_exchange(record.draft),
        verify=_exchange(record.verify),
        committed_len=one.committed_len,
        k=one.k,
        proposed=one.proposed,
        accepted=one.accepted,
        emitted=one.emitted,
        rows=one.rows,
        rollback=one.rollback,
        batch_size=len(record.sequences),
        verify_epoch=one.verify_epoch,
        draft_epoch=one.draft_epoch,
        lost=record.lost,
        k_reason=record.k_reason,
        foreseen_rate=record.foreseen_rate,
        foreseen_plain_rate=record.foreseen_plain_rate,
    )


def _exchange(timing: ServiceTiming) -> pb.ExchangeProfile | None:
    if not timing.sent_ns:
        return None
    return pb.ExchangeProfile(
        sent_ns=timing.sent_ns,
        answered_ns=timing.answered_ns,
        model_seconds=timing.model_seconds,
        service_seconds=timing.service_seconds,
        rows=timing.rows,
    )


async def _service(connection: VerifyConnection | DraftConnection) -> pb.ServiceProfile:
    info = await connection.describe()
    return pb.ServiceProfile(
        model=info.model,
        arena_tokens_largest_free=info.arena_tokens_largest_free,
        resident_bytes=info.resident_bytes,
        memory_bandwidth=info.memory_bandwidth,
    )
