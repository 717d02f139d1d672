"""``outrider bench timeline``: who works when, draft and base, over each link.

Rounds from the midst of a traced request, as both services' spans have them (see
``docs/observability.md``). Both run on this host, so their clocks are one. Where the
devices take the turns a span is the device's own turn, without the wait before it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from outrider.coordinator.bench import command, hardware, tables
from outrider.coordinator.bench.studies import links
from outrider.coordinator.local import cuda_mps
from outrider.coordinator.local.private_stack import deployments
from outrider.protos import generation_pb2 as pb
from outrider.protos import generation_pb2_grpc as rpc
from outrider.shared.config.schema import Config
from outrider.shared.core.errors import OutriderError

NEEDS_MODELS = True
SERVICES = ("draft", "verify")
"""Names of the spans of a turn."""


class NoRounds(OutriderError):
    """A traced request has too few rounds to show."""

    status = "FAILED_PRECONDITION"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the study's flags."""
    links.add_links(parser)
    parser.add_argument("--k", type=int, default=3, help="draft tokens a round (default: 3)")
    parser.add_argument("--rounds", type=int, default=8, help="how many to show (default: 8)")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--prompt-tokens", type=int, help="random token ids instead of code")
    parser.add_argument("--json", type=Path, help="write all figures to this file")


def run(args: argparse.Namespace, config: Config) -> int:
    """Measures and prints; returns the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "spans"
        traced = dataclasses.replace(config.telemetry, traces="file", file=str(file))
        own = {link: links.settings(link) for link in args.links}
        with (
            cuda_mps.daemon(args.cuda_mps) as environment,
            deployments(
                dataclasses.replace(config, telemetry=traced), own, environment=environment
            ) as deployed,
        ):
            traces = {link: _request(deployed.coordinators[link], args) for link in args.links}
        spans = list(turns(file.read_text("utf-8")))
    figures = {
        "timelines": [
            {"link": link, "turns": window([s for s in spans if s["trace"] == trace], args.rounds)}
            for link, (trace, _) in traces.items()
        ],
        "k": args.k,
        "cuda_mps": args.cuda_mps,
        "device": next(iter(traces.values()))[1],
        **hardware.provenance(),
    }
    print(table(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def turns(text: str) -> Iterator[dict[str, Any]]:
    """The turns among the spans of a file exporter's lines of JSON, times in nanoseconds."""
    for line in text.splitlines():
        for resource in json.loads(line).get("resourceSpans", []):
            for scope in resource["scopeSpans"]:
                for span in scope["spans"]:
                    if span["name"] in SERVICES:
                        yield {
                            "trace": span["traceId"],
                            "service": span["name"],
                            "begin": int(span["startTimeUnixNano"]),
                            "end": int(span["endTimeUnixNano"]),
                        }


def window(spans: Sequence[Mapping[str, Any]], rounds: int) -> list[dict[str, Any]]:
    """The turns of ``rounds`` rounds from the midst, in milliseconds from the first.

    A round begins with the draft's turn. Raises ``NoRounds`` where there are fewer of them.
    """
    ordered = sorted(spans, key=lambda span: span["begin"])
    starts = [i for i, span in enumerate(ordered) if span["service"] == "draft"]
    if len(starts) <= rounds:
        raise NoRounds(f"rounds: got {rounds}; the request had {len(starts)} with a draft's turn")
    first = (len(starts) - rounds) // 2
    shown = ordered[starts[first] : starts[first + rounds]]
    origin = shown[0]["begin"]
    return [
        {"service": one["service"]}
        | {name: (one[name] - origin) / 1e6 for name in ("begin", "end")}
        for one in shown
    ]


def shares(shown: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of the time in which each service works, and in which neither does."""
    whole = max(one["end"] for one in shown)
    made = {
        name: sum(one["end"] - one["begin"] for one in shown if one["service"] == name) / whole
        for name in SERVICES
    }
    at = busy = 0.0
    for one in sorted(shown, key=lambda one: one["begin"]):
        busy += max(0.0, one["end"] - max(at, one["begin"]))
        at = max(at, one["end"])
    return made | {"neither": 1 - busy / whole}


def table(figures: Mapping[str, Any]) -> str:
    """The figures as a Markdown table."""
    rows = []
    for one in figures["timelines"]:
        parts = shares(one["turns"])
        count = sum(turn["service"] == "draft" for turn in one["turns"])
        milliseconds = max(turn["end"] for turn in one["turns"]) / count
        rows.append([one["link"], tables.number(milliseconds, 2)])
        rows[-1] += [f"{parts[name]:.0%}" for name in (*SERVICES, "neither")]
    return tables.markdown(["link", "round ms", "draft works", "base works", "neither"], rows)


def _request(target: str, args: argparse.Namespace) -> tuple[str, str]:
    """Runs a request twice, the second time traced; its trace, and the base's device."""
    (prompt,) = command.prompts(1, args.prompt_tokens)
    request = pb.GenerateRequest(
        stopping=pb.StopConditions(max_new_tokens=args.max_new_tokens, ignore_eos=True),
        speculation=pb.SpeculationParameters(k=args.k),
    )
    if isinstance(prompt, str):
        request.prompt = prompt
    else:
        request.prompt_token_ids.ids.extend(prompt)
    trace = secrets.token_hex(16)
    with grpc.insecure_channel(target) as channel:
        stub = rpc.GenerationStub(channel)
        for sampled in (0, 1):
            parent = f"00-{trace}-{secrets.token_hex(8)}-0{sampled}"
            for _ in stub.Generate(request, metadata=(("traceparent", parent),)):
                pass
        return trace, stub.Info(pb.InfoRequest()).base.device
