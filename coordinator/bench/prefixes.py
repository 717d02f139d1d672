"""``outrider bench prefixes``: the first token of a chat's second turn.

Three prompts take turns within each repeat: the second turn of a chat that the server has seen,
the same for a client with a cache of its own, and what is new in that turn by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import secrets
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from outrider.coordinator.bench import hardware, tables
from outrider.coordinator.bench.token_ids import COMMON_IDS
from outrider.coordinator.bench.workload import in_turns
from outrider.coordinator.local.private_stack import deployment
from outrider.protos import generation_pb2 as pb
from outrider.protos import generation_pb2_grpc as rpc
from outrider.shared.config.argument_types import several, whole
from outrider.shared.config.schema import Config

NEEDS_MODELS = True
GOAL = 1.3
"""Most that the second turn may take, in times of the new part alone."""
SECOND, ANEW, ALONE = "second turn", "taken in anew", "new part alone"
VARIANTS = (SECOND, ANEW, ALONE)


@dataclass(frozen=True, slots=True)
class Answered:
    """What one request gave: its tokens, and seconds to the first of them."""

    ids: tuple[int, ...]
    seconds: float
    cached: int
    """Tokens of the prompt that were taken over."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument(
        "--history", type=int, default=900, help="tokens of the first prompt (default: 900)"
    )
    parser.add_argument(
        "--news", type=several(whole(1)), default=[1, 16, 64],
        help="tokens that the second turn adds to history and answer (default: 1,16,64)",
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=16, help="of either turn")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2, help="unmeasured repeats")
    parser.add_argument("--json", type=Path, help="write all figures to this file")


def run(args: argparse.Namespace, config: Config) -> int:
    """Measures and prints; returns the exit status."""
    with deployment(config, log=sys.stderr if args.verbose else None) as target:
        turns, info = asyncio.run(_measure(args, target))
    figures = {
        "turns": turns,
        "goal": GOAL,
        "history": args.history,
        "max_new_tokens": args.max_new_tokens,
        "repeats": args.repeats,
        "base": info.base.name,
        "draft": info.draft.name,
        "device": info.base.device,
        **hardware.provenance(),
    }
    print(table(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def table(figures: Mapping[str, Any]) -> str:
    """The figures as a Markdown table."""
    header = ["new tokens", *(f"{name}, ms" for name in VARIANTS)]
    header += ["second / alone", "second / anew", "taken over", "same tokens"]
    rows = [
        [
            str(one["new"]),
            *(tables.number(1e3 * one["first_token_seconds"][name], 2) for name in VARIANTS),
            tables.number(one["against_alone"], 2),
            tables.number(one["against_anew"], 2),
            str(one["cached"]),
            "yes" if one["same_tokens"] else "NO",
        ]
        for one in figures["turns"]
    ]
    return tables.markdown(header, rows)


def figures_of(new: int, runs: Mapping[str, Sequence[Answered]]) -> dict[str, Any]:
    """Medians over repeats, and of the ratios within each."""
    seconds = {name: [one.seconds for one in runs[name]] for name in VARIANTS}

    def against(other: str) -> float:
        pairs = zip(seconds[SECOND], seconds[other], strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    return {
        "new": new,
        "first_token_seconds": {name: statistics.median(seconds[name]) for name in VARIANTS},
        "first_token_seconds_runs": seconds,
        "against_alone": against(ALONE),
        "against_anew": against(ANEW),
        "cached": min(one.cached for one in runs[SECOND]),
        "same_tokens": all(
            one.ids == other.ids for one, other in zip(runs[SECOND], runs[ANEW], strict=True)
        ),
    }


async def _measure(
    args: argparse.Namespace, target: str
) -> tuple[list[dict[str, Any]], pb.InfoResponse]:
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.choice(COMMON_IDS) for _ in range(count)]

    made = []
    async with grpc.aio.insecure_channel(target) as channel:
        stub = rpc.GenerationStub(channel)
        for new in args.news:
            runs: dict[str, list[Answered]] = {name: [] for name in VARIANTS}
            turn: list[int] = []
            salt = ""
            for step, (name, counts) in enumerate(in_turns(VARIANTS, args.warmup, args.repeats)):
                if step % len(VARIANTS) == 0:
                    # Of each repeat its own chat, so that nothing of it is there yet.
                    salt, history = secrets.token_hex(8), tokens(args.history)
                    first = await _ask(stub, history, args.max_new_tokens, salt)
                    turn = [*history, *first.ids, *tokens(new)]
                prompt = turn[-new:] if name == ALONE else turn
                own = salt if name == SECOND else secrets.token_hex(8)
                answer = await _ask(stub, prompt, args.max_new_tokens, own)
                if counts:
                    runs[name].append(answer)
            made.append(figures_of(new, runs))
        return made, await stub.Info(pb.InfoRequest())


async def _ask(
    stub: rpc.GenerationAsyncStub, prompt: Sequence[int], count: int, salt: str
) -> Answered:
    request = pb.GenerateRequest(
        prompt_token_ids=pb.TokenIds(ids=prompt),
        stopping=pb.StopConditions(max_new_tokens=count, ignore_eos=True),
        cache_salt=salt,
    )
    ids: list[int] = []
    cached, seconds = 0, 0.0
    began = time.perf_counter()
    async for message in stub.Generate(request):
        if message.HasField("delta"):
            seconds = seconds or time.perf_counter() - began
            ids += message.delta.token_ids
        elif message.HasField("finished"):
            cached = message.finished.usage.cached_prompt_tokens
    return Answered(tuple(ids), seconds, cached)
