"""``outrider info``: describes a running coordinator."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import grpc

from outrider.coordinator.cli.generate import open_channel
from outrider.protos import generation_pb2 as pb
from outrider.protos import generation_pb2_grpc as stubs
from outrider.shared.config.schema import Config
from outrider.shared.core.links import MESSAGES
from outrider.shared.core.model_facts import read_description
from outrider.shared.process.grpc_server import authorization
from outrider.shared.process.grpc_status import message_of

TIMEOUT_SECONDS = 10.0


def run(args: argparse.Namespace, config: Config) -> int:
    """Runs the command; returns the exit status."""
    target = args.target or config.coordinator.listen
    with open_channel(target, args.ca) as channel:
        try:
            stub = stubs.GenerationStub(channel)
            info = stub.Info(
                pb.InfoRequest(),
                timeout=TIMEOUT_SECONDS,
                metadata=authorization(config.coordinator.token),
            )
        except grpc.RpcError as error:
            print(f"outrider: error: {target}: {message_of(error)}", file=sys.stderr)
            return 1
    if args.json:
        print(json.dumps(_fields(info)))
    else:
        print(_text(info))
    return 0


def _fields(message: Any) -> dict[str, Any]:
    """Every field of a message, set or not; an unset message is None."""
    made: dict[str, Any] = {}
    for spec in message.DESCRIPTOR.fields:
        value = getattr(message, spec.name)
        if spec.is_repeated:
            value = [_fields(one) if spec.message_type else one for one in value]
        elif spec.message_type is not None:
            value = _fields(value) if message.HasField(spec.name) else None
        made[spec.name] = value
    return made


def _text(info: pb.InfoResponse) -> str:
    lines = [f"outrider {info.version}, link {info.link or MESSAGES}"]
    if info.link_reason:
        lines.append(f"  no better link: {info.link_reason}")
    for role, model, cache in (
        ("base", info.base, info.base_cache),
        ("draft", info.draft, info.draft_cache),
    ):
        if not info.HasField(role):
            lines.append(f"{role}: none")
            continue
        lines.append(f"{role}: {model.name}")
        if read_description(model).is_model:
            lines += [
                f"  {model.architecture}, {model.parameters / 1e6:.1f} M parameters, {model.dtype} "
                f"on {model.device}",
                f"  vocabulary {model.vocab_size} ({model.vocab_fingerprint[:12]}), "
                f"up to {model.max_positions} positions",
            ]
        else:
            lines.append("  no model: it proposes from the text alone")
        lines += [
            f"  arena: {model.arena_tokens_used} of {model.arena_tokens} tokens in use, "
            f"{model.arena_tokens_cached} cached",
        ]
        if info.HasField(f"{role}_cache"):
            lines.append(
                f"  prefix cache: {cache.sequences} sequences, {cache.tokens} tokens; "
                f"{cache.hits} hits, {cache.hit_tokens} tokens taken over, "
                f"{cache.evictions} evictions"
            )
    lines.append(
        f"K: {_default_k(info)}, at most {info.max_k}; "
        f"{info.default_max_new_tokens} new tokens by default"
    )
    lines += _speculation(info.speculation)
    lines.append(f"requests: {info.running} running, {info.waiting} waiting")
    return "\n".join(lines)


def _default_k(info: pb.InfoResponse) -> str:
    if not info.HasField("speculation"):
        return f"{info.default_k} by default"
    state = info.speculation
    return f"adaptive (now {state.k}: {state.reason})"


def _speculation(state: pb.SpeculationState) -> list[str]:
    """What the choice rests on: a line of beliefs, and one for each K."""
    if not state.outlook:
        return []
    known = "measured at start" if state.measured else "learnt from rounds alone"
    lines = [
        f"  of {state.sequences} at once, {state.acceptance:.0%} of proposed tokens accepted; "
        f"costs {known}"
    ]
    lines += [
        f"  K = {one.k}: {one.tokens_per_second:.0f} tokens/s from rounds of "
        f"{1e3 * one.draft_seconds:.2f} + {1e3 * one.rest_seconds:.2f} ms"
        for one in state.outlook
    ]
    return lines
