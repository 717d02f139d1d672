"""``outrider bench serve``: many requests at a rate or a concurrency, and how they were served.

The client sends streaming requests to a coordinator of ours, or to any OpenAI-compatible HTTP
server, and measures both the same way. Under a rate arrivals are open: a request is sent when it
is due, however slow the answers are.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from outrider.coordinator.bench import hardware
from outrider.coordinator.bench.serve import figures, progress, report
from outrider.coordinator.bench.serve.drive import LevelRun, Target, drive
from outrider.coordinator.bench.serve.lengths import FixedLength, read_lengths
from outrider.coordinator.bench.serve.openai_target import PATHS
from outrider.coordinator.bench.serve.traffic import (
    Load,
    PlannedRequest,
    at_rate,
    drawn_requests,
    read_requests,
)
from outrider.shared.config.argument_types import number, several, whole
from outrider.shared.config.schema import Config
from outrider.shared.core.errors import InvalidRequest, ServiceUnavailable

NEEDS_MODELS = True
INTERRUPTED = 128 + signal.SIGINT
OUTPUT_TOKENS = FixedLength(128)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    where = parser.add_argument_group("what is measured (default: three processes of its own)")
    where.add_argument("--target", help="a running coordinator: host:port, unix:/path")
    where.add_argument("--ca", help="PEM file of the coordinator's CA; turns TLS on")
    where.add_argument("--url", type=_url, help="an OpenAI-compatible server: http://host:port")
    where.add_argument("--api", choices=PATHS, default="completions", help="of --url")
    where.add_argument("--model", help="with --url: its name there (default: the first it lists)")
    where.add_argument(
        "--header", type=_header, action="append", default=[], metavar="NAME:VALUE",
        help="with --url: sent with every request",
    )  # fmt: skip
    where.add_argument(
        "--body", type=_body, default={}, metavar="JSON",
        help="with --url: more fields of every request, as one JSON object",
    )  # fmt: skip

    load = parser.add_argument_group("how requests arrive: a level for each value, in turn")
    load.add_argument(
        "--rate", type=several(number(0.0, float("inf"), low_open=True)), metavar="R,…",
        help="a second, at random times (Poisson), however slow the answers are",
    )  # fmt: skip
    load.add_argument(
        "--concurrency", type=several(whole(1)), metavar="N,…",
        help="so many at once: the next when one is answered (default: 1)",
    )  # fmt: skip
    load.add_argument("--warmup", type=whole(0), default=4, help="unmeasured requests, each level")
    load.add_argument("--timeout", type=number(0.0, 1e6, low_open=True), default=600.0,
                      help="seconds after which a request fails (default: 600)")  # fmt: skip

    what = parser.add_argument_group("what they ask for")
    what.add_argument("--num-requests", type=whole(1), help="of each level (default: 64)")
    what.add_argument(
        "--prompt-tokens", type=read_lengths, metavar="LENGTHS",
        help="random ids: N, uniform:LOW-HIGH or lognormal:MEAN,SIGMA (default: held-out code)",
    )  # fmt: skip
    what.add_argument(
        "--max-new-tokens", type=read_lengths, metavar="LENGTHS",
        help=f"the same, of the answers (default: {OUTPUT_TOKENS})",
    )  # fmt: skip
    what.add_argument(
        "--requests", type=Path, metavar="FILE",
        help="JSON lines with prompt or prompt_tokens, max_new_tokens, and at (seconds) or not",
    )  # fmt: skip
    what.add_argument("--seed", type=whole(0), default=0, help="of arrivals, lengths and prompts")
    what.add_argument("--temperature", type=number(0.0, float("inf")), default=0.0)
    what.add_argument("--k", type=whole(0), help="draft tokens per proposal; unset adapts")
    what.add_argument(
        "--ignore-eos", action=argparse.BooleanOptionalAction, default=True,
        help="answers go on to their full length",
    )  # fmt: skip

    parser.add_argument(
        "--slo", type=figures.read_limits, default={}, metavar="NAME=SECONDS,…",
        help="limits of ttft, tpot, itl, e2e: goodput counts the requests that keep them all",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write all figures to this file")


def run(args: argparse.Namespace, config: Config) -> int:
    """Measures and prints; returns the exit status. Raises ``OutriderError``."""
    _check(args)
    levels = _levels(args)
    if args.url is not None or args.target is not None:
        return _measure_and_report(args, config, levels, args.target)
    from outrider.coordinator.local import cuda_mps
    from outrider.coordinator.local.private_stack import deployment

    log = sys.stderr if args.verbose else None
    with ExitStack() as stack:
        environment = stack.enter_context(cuda_mps.daemon(args.cuda_mps))
        target = stack.enter_context(deployment(config, log=log, environment=environment))
        return _measure_and_report(args, config, levels, target)


def _check(args: argparse.Namespace) -> None:
    """Raises ``InvalidRequest`` for flags that do not go together."""
    if args.url is None:
        given = {"--model": args.model, "--header": args.header, "--body": args.body}
        for name, value in given.items():
            if value:
                raise InvalidRequest(name, value, "given with --url")
    else:
        for name in ("target", "ca", "k"):
            if (value := getattr(args, name)) is not None:
                raise InvalidRequest(f"--{name}", value, "left out with --url")
    if args.json is not None and not args.json.parent.is_dir():
        # Said before anything is measured, not after it.
        raise InvalidRequest("--json", str(args.json), "a file in a folder that is there")
    if args.requests is not None:
        for name in ("prompt_tokens", "max_new_tokens"):
            if getattr(args, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise InvalidRequest(
                    flag, str(getattr(args, name)), "left out with --requests, which says it"
                )


def _levels(args: argparse.Namespace) -> list[tuple[Load, list[PlannedRequest]]]:
    """Each level's load and its requests, those of the warm-up first."""
    loads = [Load(concurrency=count) for count in args.concurrency or ()]
    loads += [Load(rate=rate) for rate in args.rate or ()]
    if not loads:
        # The first tells for all: a file's lines all say when, or none does.
        first = args.requests and read_requests(args.requests, seed=args.seed, level=0)[0]
        loads = [Load() if first and first.at is not None else Load(concurrency=1)]
    return [(load, _requests(args, load, level)) for level, load in enumerate(loads)]


def _requests(args: argparse.Namespace, load: Load, level: int) -> list[PlannedRequest]:
    if args.requests is not None:
        counted = read_requests(args.requests, seed=args.seed, level=level)
        counted = counted[: args.num_requests]
        # The warm-up asks for what the file asks for, and for random prompts anew.
        more = read_requests(args.requests, seed=args.seed, level=-1 - level)
        warmup = [more[i % len(more)] for i in range(args.warmup)]
    else:
        drawn = drawn_requests(
            args.warmup + (args.num_requests or 64),
            args.prompt_tokens,
            args.max_new_tokens or OUTPUT_TOKENS,
            seed=args.seed,
            level=level,
        )
        warmup, counted = drawn[: args.warmup], drawn[args.warmup :]
    if load.rate is not None:
        counted = at_rate(counted, load.rate, args.seed)
    return [*warmup, *counted]


def _measure_and_report(
    args: argparse.Namespace,
    config: Config,
    levels: list[tuple[Load, list[PlannedRequest]]],
    target: str | None,
) -> int:
    made, interrupted = asyncio.run(_measure(args, config, levels, target))
    made |= {
        **hardware.provenance(),
        "workload": {
            "prompt_tokens": None if args.prompt_tokens is None else str(args.prompt_tokens),
            "max_new_tokens": str(args.max_new_tokens or OUTPUT_TOKENS),
            "requests": None if args.requests is None else str(args.requests),
            "seed": args.seed,
            "temperature": args.temperature,
            "ignore_eos": args.ignore_eos,
            "warmup": args.warmup,
            "timeout_seconds": args.timeout,
            "limits": args.slo,
        },
    }
    if made["levels"]:
        print(report.text(made))
    if args.json:
        args.json.write_text(json.dumps(made, indent=1) + "\n")
    if interrupted:
        return INTERRUPTED
    return 0 if all(level["completed"] for level in made["levels"]) else 1


async def _measure(
    args: argparse.Namespace,
    config: Config,
    levels: list[tuple[Load, list[PlannedRequest]]],
    address: str | None,
) -> tuple[dict[str, Any], bool]:
    """The levels' figures, and whether a signal ended it before its time."""
    stop = asyncio.Event()
    made = []
    async with _opened(args, config, address) as target:
        described = dict(await target.describe())
        with _stopped_by_signals(stop):
            for load, requests in levels:
                run = await _level(args, target, load, requests, stop)
                if run is not None:
                    made.append(figures.summary(load, run, args.slo))
                if stop.is_set():
                    break
    return {"levels": made, "target": described}, stop.is_set()


async def _level(
    args: argparse.Namespace,
    target: Target,
    load: Load,
    requests: list[PlannedRequest],
    stop: asyncio.Event,
) -> LevelRun | None:
    """One level after its warm-up; None where nothing of it was measured."""
    warmup, counted = requests[: args.warmup], requests[args.warmup :]

    async def some(requests: list[PlannedRequest], concurrency: int | None, name: str) -> LevelRun:
        show = progress.watcher(name, len(requests), sys.stderr)
        try:
            return await drive(
                target, requests, concurrency=concurrency, timeout=args.timeout,
                stop=stop, progress=show,
            )  # fmt: skip
        finally:
            progress.clear(sys.stderr)

    if warmup:
        run = await some(warmup, load.concurrency or len(warmup), f"{load}, warm-up")
        if run.answers and all(one.failure is not None for one in run.answers):
            first = run.answers[0]
            raise ServiceUnavailable(
                f"every warm-up request failed, {first.failure}: {first.failure_message}"
            )
    if stop.is_set():
        return None
    return await some(counted, load.concurrency, str(load))


@asynccontextmanager
async def _opened(
    args: argparse.Namespace, config: Config, address: str | None
) -> AsyncIterator[Target]:
    if args.url is not None:
        from outrider.coordinator.bench.serve import openai_target as http

        async with http.open_http(dict(args.header)) as session:
            body = {
                "model": args.model or await http.first_model(session, args.url),
                "temperature": args.temperature,
                "seed": args.seed,
                **({"ignore_eos": True} if args.ignore_eos else {}),
                **args.body,
            }
            yield http.OpenAITarget(session, args.url, args.api, body)
        return
    from outrider.coordinator.bench.serve import grpc_target

    assert address is not None
    async with grpc_target.open_grpc(address, args.ca) as channel:
        yield grpc_target.GrpcTarget(
            channel,
            token=config.coordinator.token if args.target else None,
            temperature=args.temperature,
            seed=args.seed,
            ignore_eos=args.ignore_eos,
            k=args.k,
        )


@contextmanager
def _stopped_by_signals(stop: asyncio.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set ``stop`` inside, and do what they did before afterwards."""
    loop, numbers = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    for one in numbers:
        loop.add_signal_handler(one, stop.set)
    try:
        yield
    finally:
        for one in numbers:
            loop.remove_signal_handler(one)
            signal.signal(one, before[one])


def _url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"got {text!r}; must begin with http:// or https://")
    return text.rstrip("/").removesuffix("/v1")


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not (name.strip() and colon and value.strip()):
        raise argparse.ArgumentTypeError(f"got {text!r}; must be NAME:VALUE")
    return name.strip(), value.strip()


def _body(text: str) -> dict[str, object]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"got {text!r}; must be a JSON object")
    return found
