"""The structured record of one request: what ``outrider generate --profile`` writes.

One JSON object; times are seconds, those with ``at`` in their name counted from the request's
arrival. A model is described by all of ``ModelFacts``.

A round's phases: ``draft`` and ``verify`` are the models' own forwards, ``cache`` is what the
services spend around them (admitting sequences, rolling back, reading and writing messages),
``link`` is messages on their way, ``accept`` is verdicts' arrival to the logs, ``schedule`` is
the coordinator before and between messages. They add up to the round, save for ``hidden``,
the drafting that ran while the verifier worked. ``idle`` is between the rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

from outrider.coordinator.profile.file import FORMAT, PHASES, VERSION
from outrider.coordinator.telemetry import phases
from outrider.coordinator.telemetry.ceiling import rate_ceiling
from outrider.coordinator.telemetry.percentile import percentile
from outrider.protos import generation_pb2 as pb
from outrider.shared.core.model_facts import model_name, read_description


def build(profile: pb.ProfileResponse, text: dict[str, Any]) -> dict[str, Any]:
    """The record; ``text`` is what the client saw: prompt, tokens, usage, seed and so on."""
    rounds = _rounds(profile)
    speculation = _speculation(rounds)
    made: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "request": text,
        "trace_id": profile.trace_id,
        "models": {
            role: _model(getattr(profile, role))
            for role in ("base", "draft")
            if profile.HasField(role)
        },
        "link": profile.link,
        "seconds": _seconds(profile, text),
        "phases": {name: spread([one["phases"][name] for one in rounds]) for name in PHASES},
        "round_seconds": spread([one["seconds"] for one in rounds]),
        "speculation": speculation,
        "memory": _memory(profile),
        "rounds": rounds,
    }
    made["ceiling"] = _ceiling(profile, rounds)
    return made


def spread(values: Sequence[float]) -> dict[str, float]:
    """Sum, mean, median and tails; percentiles by linear interpolation."""
    if not values:
        return dict.fromkeys(("total", "mean", "median", "p90", "p99", "max"), 0.0)
    ordered = sorted(values)
    return {
        "total": math.fsum(ordered),
        "mean": math.fsum(ordered) / len(ordered),
        "median": percentile(ordered, 0.5),
        "p90": percentile(ordered, 0.9),
        "p99": percentile(ordered, 0.99),
        "max": ordered[-1],
    }


def _rounds(profile: pb.ProfileResponse) -> list[dict[str, Any]]:
    made = []
    before = profile.admitted_ns
    for one in profile.rounds:
        parts = phases.split(one.started_ns, one.finished_ns, one.draft, one.verify)
        cache = sum(
            max(0.0, own - side.model_seconds)
            for own, side in ((parts.draft, one.draft), (parts.verify, one.verify))
        )
        made.append(
            {
                "round": one.round,
                "mode": _mode(one),
                "at": (one.started_ns - profile.arrived_ns) / 1e9,
                "seconds": parts.total,
                "k": one.k,
                "proposed": one.proposed,
                "accepted": one.accepted,
                "emitted": one.emitted,
                "rows": one.rows,
                "rollback": one.rollback,
                "committed_len": one.committed_len,
                "batch_size": one.batch_size,
                "verify_epoch": one.verify_epoch,
                "draft_epoch": one.draft_epoch,
                "lost": one.lost,
                "k_reason": one.k_reason,
                "foreseen_rate": one.foreseen_rate,
                "foreseen_plain_rate": one.foreseen_plain_rate,
                "phases": {
                    "draft": min(one.draft.model_seconds, parts.draft),
                    "verify": min(one.verify.model_seconds, parts.verify),
                    "cache": cache,
                    "link": parts.wire,
                    "accept": parts.accept,
                    "schedule": parts.schedule,
                    "idle": max(0.0, (one.started_ns - before) / 1e9) if before else 0.0,
                },
                "hidden": parts.hidden,
                "draft": _exchange(one, "draft", profile.arrived_ns),
                "verify": _exchange(one, "verify", profile.arrived_ns),
            }
        )
        before = max(before, one.finished_ns)
    return made


def _exchange(one: pb.RoundProfile, side: str, origin: int) -> dict[str, Any] | None:
    if not one.HasField(side):
        return None
    exchange: pb.ExchangeProfile = getattr(one, side)
    whole = (exchange.answered_ns - exchange.sent_ns) / 1e9
    own = min(exchange.service_seconds, whole)
    sent = (exchange.sent_ns - origin) / 1e9
    return {
        "sent_at": sent,
        "answered_at": sent + whole,
        # When exactly the message arrived there is not known here: the way there and the way
        # back are taken to be equally long.
        "served_at": sent + (whole - own) / 2,
        "service_seconds": own,
        "model_seconds": min(exchange.model_seconds, own),
        "rows": exchange.rows,
    }


def _mode(one: pb.RoundProfile) -> str:
    if one.proposed:
        return "speculative"
    return "prefill" if not one.emitted or one.rows > 1 else "plain"


def _speculation(rounds: Iterable[dict[str, Any]]) -> dict[str, Any]:
    verifies = [one for one in rounds if one["emitted"]]
    proposed = [0] * max((one["proposed"] for one in verifies), default=0)
    accepted = list(proposed)
    for one in verifies:
        for position in range(one["proposed"]):
            proposed[position] += 1
            accepted[position] += position < one["accepted"]
    emitted = sum(one["emitted"] for one in verifies)
    return {
        "rounds": len(verifies),
        "proposed": sum(proposed),
        "accepted": sum(accepted),
        "wasted": sum(proposed) - sum(accepted),
        "acceptance_rate": sum(accepted) / sum(proposed) if proposed else 0.0,
        "mean_accepted_length": emitted / len(verifies) if verifies else 0.0,
        "mean_k": sum(one["k"] for one in verifies) / len(verifies) if verifies else 0.0,
        "proposed_by_position": proposed,
        "accepted_by_position": accepted,
    }


def _seconds(profile: pb.ProfileResponse, text: dict[str, Any]) -> dict[str, float]:
    arrived, finished = profile.arrived_ns, profile.finished_ns
    admitted = profile.admitted_ns or finished
    first = profile.first_token_ns or finished
    tokens = len(text.get("token_ids", ()))
    decoding = (finished - first) / 1e9
    return {
        "total": (finished - arrived) / 1e9,
        "queue": (admitted - arrived) / 1e9,
        "prefill": (first - admitted) / 1e9,
        "first_token": (first - arrived) / 1e9,
        "decode": decoding,
        "tokens_per_second": (tokens - 1) / decoding if tokens > 1 and decoding > 0 else 0.0,
    }


def _ceiling(
    profile: pb.ProfileResponse, rounds: Sequence[dict[str, Any]]
) -> dict[str, float] | None:
    """Speed of the decoding rounds against what the memory's speed allows; None: not known.

    What memory allows follows from the tokens and the K of the very same rounds: weights are
    read once for each draft token and once for the verify.
    """
    decoding = [one for one in rounds if one["emitted"] and one["mode"] != "prefill"]
    seconds = sum(one["seconds"] for one in decoding)
    if not seconds:
        return None
    tokens = sum(one["emitted"] for one in decoding)
    k = sum(one["k"] for one in decoding) / len(decoding)
    base, draft = profile.base, profile.draft
    ceiling = rate_ceiling(base, draft, tokens / len(decoding), k)
    if not ceiling:
        return None
    alone = rate_ceiling(base, None, 1.0, 0.0)
    return {
        "memory_bandwidth": base.memory_bandwidth,
        "tokens_per_second": ceiling,
        "base_alone_tokens_per_second": alone or 0.0,
        "measured_tokens_per_second": tokens / seconds,
        "share": tokens / seconds / ceiling,
    }


def _model(profile: pb.ServiceProfile) -> dict[str, Any]:
    facts = read_description(profile.model)
    return asdict(replace(facts, name=model_name(facts.name)))


def _memory(profile: pb.ProfileResponse) -> dict[str, Any]:
    made: dict[str, Any] = {"coordinator": {"resident_bytes": profile.coordinator_resident_bytes}}
    for role in ("base", "draft"):
        if profile.HasField(role):
            one: pb.ServiceProfile = getattr(profile, role)
            made[role] = {
                "resident_bytes": one.resident_bytes,
                "arena_tokens": one.model.arena_tokens,
                "arena_tokens_used": one.model.arena_tokens_used,
                "arena_tokens_largest_free": one.arena_tokens_largest_free,
            }
    return made
