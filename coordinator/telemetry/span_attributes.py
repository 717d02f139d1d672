"""The attributes of requests, rounds and failovers, from their records.

Every name is declared in ``coordinator/telemetry/attributes.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from outrider.coordinator.telemetry import phases
from outrider.coordinator.telemetry.attributes import OPERATION, PROVIDER
from outrider.coordinator.telemetry.records import (
    ConnectionRecord,
    RequestRecord,
    RoundRecord,
    SequenceRound,
)

_SIGN = 1 << 63


def of_round(record: RoundRecord, parts: phases.Phases, mode: str) -> dict[str, Any]:
    """What every span of one round says."""
    made: dict[str, Any] = {
        "outrider.round": record.round,
        "outrider.round.mode": mode,
        "outrider.batch_size": len(record.sequences),
        "outrider.link": record.link,
        "outrider.draft.time": parts.draft,
        "outrider.verify.time": parts.verify,
        "outrider.wire.time": parts.wire,
        "outrider.accept.time": parts.accept,
        "outrider.schedule.time": parts.schedule,
        "outrider.hidden.time": parts.hidden,
        "outrider.draft.device_time": record.draft.model_seconds,
        "outrider.verify.device_time": record.verify.model_seconds,
    }
    if record.lost:
        made["outrider.lost"] = record.lost
    return made


def of_request(record: RequestRecord, model: str) -> dict[str, Any]:
    """What the span of one sample says; ``model`` names the base."""
    decoding = record.decoding
    proposed, accepted = sum(record.proposed_by_position), sum(record.accepted_by_position)
    made: dict[str, Any] = {
        "gen_ai.operation.name": OPERATION,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.response.id": record.request_id,
        "gen_ai.request.temperature": decoding.temperature,
        "gen_ai.request.top_p": decoding.top_p,
        "gen_ai.request.top_k": decoding.top_k,
        "gen_ai.request.frequency_penalty": decoding.frequency_penalty,
        "gen_ai.request.presence_penalty": decoding.presence_penalty,
        "gen_ai.request.max_tokens": record.max_new_tokens,
        # Attributes are signed 64-bit numbers, seeds unsigned.
        "gen_ai.request.seed": (decoding.seed + _SIGN) % (2 * _SIGN) - _SIGN,
        "gen_ai.request.stream": True,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "outrider.cached_prompt_tokens": record.cached_prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "gen_ai.response.finish_reasons": (record.reason.lower(),),
        "outrider.sample.index": record.sample_index,
        "outrider.rule": record.rule.lower(),
        "outrider.rounds": record.rounds,
        "outrider.proposed": proposed,
        "outrider.accepted": accepted,
    }
    if record.first_token_ns:
        seconds = (record.first_token_ns - record.arrived_ns) / 1e9
        made["gen_ai.response.time_to_first_chunk"] = seconds
    if proposed:
        made["outrider.acceptance.rate"] = accepted / proposed
    if record.rounds:
        made["outrider.accepted.length.mean"] = (accepted + record.rounds) / record.rounds
    if record.k is not None:
        made["outrider.k"] = record.k
    if record.error:
        made["error.type"] = record.reason
    return made


def mode_of(record: RoundRecord) -> str:
    """``speculative``, ``plain``, ``prefill``, or ``mixed`` where prompts rode along."""
    prefill = speculative = 0
    for one in record.sequences:
        if one.proposed:
            speculative += 1
        elif not one.emitted or one.rows > 1:
            prefill += 1
    if not prefill:
        return "speculative" if speculative else "plain"
    return "prefill" if prefill == len(record.sequences) else "mixed"


def of_sequences(sequences: Sequence[SequenceRound]) -> dict[str, int]:
    """Of one sequence as it is; of several the sums, and the largest of what can't be summed."""
    return {
        "outrider.k": max(one.k for one in sequences),
        "outrider.proposed": sum(one.proposed for one in sequences),
        "outrider.accepted": sum(one.accepted for one in sequences),
        "outrider.emitted": sum(one.emitted for one in sequences),
        "outrider.rollback": sum(one.rollback for one in sequences),
        "outrider.committed_len": max(one.committed_len for one in sequences),
        "outrider.rows": sum(one.rows for one in sequences),
        "outrider.verify.epoch": max(one.verify_epoch for one in sequences),
        "outrider.draft.epoch": max(one.draft_epoch for one in sequences),
        "outrider.refused": sum(one.refused != 0 for one in sequences),
    }


def of_failover(record: ConnectionRecord) -> dict[str, Any]:
    """What a lost service's event and span say."""
    return {
        "outrider.service": record.service,
        "outrider.reason": record.reason,
        "outrider.sequences": record.sequences,
    }
