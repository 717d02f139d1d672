"""``outrider bench links``: the same rounds over every link, against both models in one process.

One pair of services serves one coordinator for each link, so that all variants run the same
processes and models; they take turns within every repeat. In-process is the yardstick: it has
the engines and the arithmetic of the services, and nothing between them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc

from outrider.coordinator.bench import command, hardware, tables
from outrider.coordinator.bench.studies import bare_links
from outrider.coordinator.bench.studies.in_process import InProcess
from outrider.coordinator.bench.workload import Run, Workload, in_turns, run_once, summary
from outrider.coordinator.local import cuda_mps
from outrider.coordinator.local.private_stack import deployments
from outrider.coordinator.requests.text.tokenizer import load_tokenizer
from outrider.protos import generation_pb2 as pb
from outrider.protos import generation_pb2_grpc as rpc
from outrider.shared.config.argument_types import several, whole
from outrider.shared.config.schema import Config
from outrider.shared.core.links import LINKS

NEEDS_MODELS = True
BY_HOST = [link.name for link in LINKS.values() if link.way != "device"]
"""Links that can be measured on any host."""
IN_PROCESS = "in-process"

Variant = tuple[str, int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    counts = several(whole(0))
    add_links(parser)
    parser.add_argument(
        "--in-process",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="both models in this process too, as the yardstick",
    )
    parser.add_argument("--ks", type=counts, default=[0, 1, 2, 3, 4], help="default: 0,1,2,3,4")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="unmeasured repeats")
    parser.add_argument("--prompt-tokens", type=int, help="random token ids instead of code")
    parser.add_argument("--json", type=Path, help="write all figures to this file")


def run(args: argparse.Namespace, config: Config) -> int:
    """Measures and prints; returns the exit status."""
    prompts = command.prompts(args.prompts, args.prompt_tokens)
    if args.prompt_tokens is None:
        encode = load_tokenizer(config.coordinator.tokenizer).encode
        prompts = [encode(str(text)) for text in prompts]
    workload = Workload(prompts=prompts, max_new_tokens=args.max_new_tokens)
    yardstick = InProcess(config) if args.in_process else None
    own = {link: settings(link) for link in args.links}
    log = sys.stderr if args.verbose else None
    with (
        cuda_mps.daemon(args.cuda_mps) as environment,
        deployments(config, own, log=log, environment=environment) as deployed,
    ):
        runs, info = asyncio.run(_measure(args, deployed.coordinators, workload, yardstick))
        bare = bare_links.measure(deployed, args.links)
    figures = {
        "bare": bare,
        "variants": [_figures(variant, runs) for variant in runs],
        "base": info.base.name,
        "draft": info.draft.name,
        "device": info.base.device,
        **hardware.provenance(),
        "repeats": args.repeats,
        "max_new_tokens": args.max_new_tokens,
        "prompts": len(prompts),
    }
    print(table(figures))
    print()
    print(bare_table(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def table(figures: Mapping[str, Any]) -> str:
    """The figures as a Markdown table."""
    rows = [
        [
            one["link"],
            str(one["k"]),
            tables.number(one["tokens_per_second"], 1),
            tables.number(one.get("speedup"), 2, "-"),
            tables.number(one.get("against_in_process"), 3, "-"),
            tables.number(one["mean_accepted_length"], 2, "-"),
            tables.number(one["round_ms"]["draft"], 2),
            tables.number(one["round_ms"]["verify"], 2),
            tables.number(1e3 * one["round_ms"]["overhead"], 0),
            {True: "yes", False: "NO", None: "-"}[one.get("same_tokens_as_base")],
        ]
        for one in figures["variants"]
    ]
    header = ["link", "K", "tokens/s", "against base", "against in-process", "tokens/round"]
    header += ["draft ms", "verify ms", "overhead µs", "same tokens"]
    return tables.markdown(header, rows)


def bare_table(figures: Mapping[str, Any]) -> str:
    """What the links cost by themselves, as a Markdown table."""
    rows = [
        [one["link"], *(tables.number(1e6 * one[name], 0) for name in ("median", "p99"))]
        for one in figures["bare"]
    ]
    return tables.markdown(["link alone", "round µs, median", "99th percentile"], rows)


async def _measure(
    args: argparse.Namespace,
    targets: Mapping[str, str],
    workload: Workload,
    yardstick: InProcess | None,
) -> tuple[dict[Variant, list[Run]], pb.InfoResponse]:
    channels = {link: grpc.aio.insecure_channel(target) for link, target in targets.items()}
    stubs = {link: rpc.GenerationStub(channel) for link, channel in channels.items()}
    variants: list[Variant] = [(link, k) for k in args.ks for link in targets]
    if yardstick is not None:
        variants += [(IN_PROCESS, k) for k in args.ks]
    runs: dict[Variant, list[Run]] = {variant: [] for variant in sorted(variants)}

    async def one(variant: Variant) -> Run:
        link, k = variant
        if link == IN_PROCESS:
            assert yardstick is not None
            prompts: Any = workload.prompts
            return yardstick.run(workload, prompts, k)
        return await run_once(stubs[link], workload, k)

    try:
        for variant, counts in in_turns(variants, args.warmup, args.repeats):
            run = await one(variant)
            if counts:
                runs[variant].append(run)
        link = next(iter(stubs))
        return runs, await stubs[link].Info(pb.InfoRequest())
    finally:
        for channel in channels.values():
            await channel.close()


def _figures(variant: Variant, runs: Mapping[Variant, list[Run]]) -> dict[str, object]:
    link, k = variant
    made = {"link": link, **summary(k, runs[variant], runs.get((link, 0)))}
    yardstick = runs.get((IN_PROCESS, k))
    if yardstick is not None:
        made["against_in_process"] = statistics.median(
            a.speed() / b.speed() for a, b in zip(runs[variant], yardstick, strict=True)
        )
        made["same_tokens_as_in_process"] = all(
            a.outputs == b.outputs for a, b in zip(runs[variant], yardstick, strict=True)
        )
    return made


def add_links(parser: argparse.ArgumentParser) -> None:
    """Declares the flag that says over which links."""
    parser.add_argument(
        "--links", type=names, default=BY_HOST, help=f"default: {','.join(BY_HOST)}"
    )


def settings(link: str) -> dict[str, Any]:
    """What the coordinator of a link has of its own."""
    # Where draft and base share nothing every round is two exchanges of messages.
    return {"link": link} | ({} if LINKS[link].carrier else {"grant_rounds": 0})


def names(text: str) -> list[str]:
    """Links as a flag has them, by commas."""
    links = text.split(",")
    for link in links:
        if link not in LINKS:
            raise argparse.ArgumentTypeError(f"{link!r}; must be of {', '.join(LINKS)}")
    return links
