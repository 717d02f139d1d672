"""``outrider bench adaptive``: what the server's own choice of K is worth.

For each number of sequences, and each share of draft tokens that are the base's: the base alone,
every fixed K, and K chosen by the coordinator. They take turns within every repeat, and each run
has a coordinator of its own, which has learnt nothing before its first token; the services stay.

With a paced pair (``--base paced:step=8ms,row=0.1ms --draft paced:step=1ms``) rounds take set
times on any machine, and the draft agrees as often as the study asks, also with some sequences
more often than with others. With other models they agree as they do.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import grpc

from outrider.coordinator.bench import command, hardware, tables
from outrider.coordinator.bench.token_ids import COMMON_IDS
from outrider.coordinator.bench.workload import Run, Workload, in_turns, run_once
from outrider.coordinator.local import cuda_mps
from outrider.coordinator.local.private_stack import Deployed, deployments, fresh_coordinator
from outrider.protos import generation_pb2 as pb
from outrider.protos import generation_pb2_grpc as rpc
from outrider.shared.config.argument_types import several, whole
from outrider.shared.config.schema import Config
from outrider.shared.core.errors import ConfigError
from outrider.shared.model.paced.spec import parse

NEEDS_MODELS = True
LEAST_TOKENS = 16
"""Fewer may come in one round, which has no speed."""
PACED_PROMPT = 16
"""Tokens of a prompt for paced models, which have no text."""

Mix = tuple[float, ...]
"""Shares of the draft's tokens that are the base's, of the sequences in turn."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument(
        "--sequences",
        type=several(whole(1)),
        default=[1, 2, 4, 8, 16, 32, 64],
        help="requests at once (default: 1,2,4,8,16,32,64)",
    )
    parser.add_argument(
        "--agreements",
        type=_mixes,
        help="of a paced draft: shares of tokens that are the base's; sequences take those of a "
        "mix, joined by /, in turn (default: 0.2,0.5,0.8,0.95,0.2/0.95)",
    )
    parser.add_argument(
        "--ks", type=several(whole(1)), default=[1, 2, 3, 4, 6, 8], help="default: 1,2,3,4,6,8"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=0, help="unmeasured repeats")
    parser.add_argument("--prompt-tokens", type=int, help="random token ids instead of code")
    parser.add_argument("--json", type=Path, help="write all figures to this file")


def run(args: argparse.Namespace, config: Config) -> int:
    """Measures and prints; returns the exit status. Raises ``ConfigError``."""
    if args.max_new_tokens < LEAST_TOKENS:
        raise ConfigError(
            f"--max-new-tokens: got {args.max_new_tokens}; must be at least {LEAST_TOKENS}"
        )
    mixes: list[Mix | None] = [None]
    shares: list[float] = []
    if parse(config.base.path) and parse(config.draft.path):
        asked = args.agreements or _mixes("0.2,0.5,0.8,0.95,0.2/0.95")
        mixes, shares = list(asked), sorted({share for mix in asked for share in mix})
        config = _agreeing(config, shares)
    elif args.agreements:
        raise ConfigError("--agreements: base and draft must be paced models, see --base paced:…")
    loads = [
        (mix, count) for mix in mixes for count in args.sequences if count >= len(mix or (None,))
    ]
    if not loads:
        raise ConfigError("--sequences: fewer than each mix of --agreements has members")
    with (
        cuda_mps.daemon(args.cuda_mps) as environment,
        deployments(config, {}, log=_log(args), environment=environment) as deployed,
    ):
        points = []
        for mix, count in loads:
            workload = _workload(args, count, mix, shares)
            runs, info = asyncio.run(_measure(args, deployed, workload))
            points.append(point(mix, count, runs))
            print(table({"points": points[-1:]}).splitlines()[-1], file=sys.stderr)
    figures = {
        "points": points,
        "base": info.base.name,
        "draft": info.draft.name,
        "device": info.base.device,
        "link": info.link,
        **hardware.provenance(),
        "repeats": args.repeats,
        "max_new_tokens": args.max_new_tokens,
    }
    print(table(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def point(
    mix: Mix | None, sequences: int, runs: Mapping[int | None, Sequence[Run]]
) -> dict[str, Any]:
    """The figures of one number of sequences and one mix; ``runs`` by K, None being adaptive.

    ``ratio``: adaptive against the best of the others, whose K has the highest median, the median
    of what each repeat gave; ``speedup``: the same against the base alone.
    """
    speeds = {k: [one.decode_speed() for one in some] for k, some in runs.items()}
    best = max((k for k in speeds if k is not None), key=lambda k: median(speeds[k]))

    def against(k: int) -> float:
        return median(a / b for a, b in zip(speeds[None], speeds[k], strict=True))

    return {
        "agreement": None if mix is None else "/".join(f"{share:g}" for share in mix),
        "sequences": sequences,
        "variants": [
            {
                "k": k,
                "tokens_per_second": median(speeds[k]),
                "tokens_per_second_runs": speeds[k],
                "acceptance_rate": _rate(some),
                "same_tokens_as_base": all(
                    one.outputs == alone.outputs for one, alone in zip(some, runs[0], strict=True)
                ),
            }
            for k, some in runs.items()
        ],
        "best_k": best,
        "ratio": against(best),
        "speedup": against(0),
    }


def _rate(runs: Sequence[Run]) -> float | None:
    proposed = sum(one.proposed for one in runs)
    return sum(one.accepted for one in runs) / proposed if proposed else None


def table(figures: Mapping[str, Any]) -> str:
    """The figures as a Markdown table."""
    rows = []
    for one in figures["points"]:
        speeds = {v["k"]: v["tokens_per_second"] for v in one["variants"]}
        same = all(v["same_tokens_as_base"] for v in one["variants"])
        rows.append(
            [
                one["agreement"] or "-",
                str(one["sequences"]),
                tables.number(speeds[0], 0),
                str(one["best_k"]),
                tables.number(speeds[one["best_k"]], 0),
                tables.number(speeds[None], 0),
                tables.number(one["ratio"], 3),
                tables.number(one["speedup"], 2),
                "yes" if same else "NO",
            ]
        )
    header = ["agreement", "sequences", "K = 0, tokens/s", "best K", "tokens/s", "adaptive"]
    header += ["against best", "against K = 0", "same tokens"]
    return tables.markdown(header, rows)


def _agreeing(config: Config, shares: Sequence[float]) -> Config:
    """With a draft that agrees by these shares with the sequences whose prompts begin with their
    places; see ``PacedSpec.agreement``."""
    path = config.draft.path
    if "agreement=" in path:
        raise ConfigError(f"--draft: got {path}; the agreement must be left to --agreements")
    path = f"{path},agreement={'/'.join(map(str, shares))}"
    return dataclasses.replace(config, draft=dataclasses.replace(config.draft, path=path))


def _workload(
    args: argparse.Namespace, count: int, mix: Mix | None, shares: Sequence[float]
) -> Workload:
    prompts: Sequence[str | Sequence[int]]
    if mix is None:
        prompts = command.prompts(count, args.prompt_tokens)
    else:
        draw = random.Random(0)
        rest = (args.prompt_tokens or PACED_PROMPT) - 1
        prompts = [
            [shares.index(mix[i % len(mix)]), *(draw.choice(COMMON_IDS) for _ in range(rest))]
            for i in range(count)
        ]
    return Workload(
        # There may be fewer held-out texts than sequences.
        prompts=[prompts[i % len(prompts)] for i in range(count)],
        max_new_tokens=args.max_new_tokens,
        concurrency=count,
    )


async def _measure(
    args: argparse.Namespace, deployed: Deployed, workload: Workload
) -> tuple[dict[int | None, list[Run]], pb.InfoResponse]:
    variants: list[int | None] = [*dict.fromkeys([0, *args.ks]), None]
    runs: dict[int | None, list[Run]] = {k: [] for k in variants}
    for k, counts in in_turns(variants, args.warmup, args.repeats):
        with fresh_coordinator(deployed, _log(args)) as target:
            async with grpc.aio.insecure_channel(target) as channel:
                stub = rpc.GenerationStub(channel)
                info = await stub.Info(pb.InfoRequest())
                run = await run_once(stub, workload, k)
        if counts:
            runs[k].append(run)
    return runs, info


def _log(args: argparse.Namespace) -> Any:
    return sys.stderr if args.verbose else None


def _mixes(text: str) -> list[Mix]:
    mixes = [tuple(float(share) for share in part.split("/")) for part in text.split(",")]
    if not all(0 <= share <= 1 for mix in mixes for share in mix):
        raise argparse.ArgumentTypeError(f"{text!r}; must be numbers in 0..1")
    return mixes
