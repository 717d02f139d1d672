"""``outrider bench tracing``: what it costs to be seen.

Two deployments of the same models stand side by side, one with telemetry off and one that
sends traces to a collector. Requests go to them in turns, prompt by prompt: untraced, sampled
out (the client's ``traceparent`` says so) and traced in every round. What is compared are
medians of the ratios between neighbours, so that a machine whose speed drifts slows all alike.

A second part drives the coordinator's observer with made-up rounds at a fixed rate, far above
what models on a CPU reach, and counts what the collector got.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import random
import secrets
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from outrider.coordinator.bench import hardware, tables
from outrider.coordinator.local.private_stack import deployment
from outrider.coordinator.telemetry.records import (
    RequestRecord,
    RoundRecord,
    SequenceRound,
    ServiceTiming,
)
from outrider.protos import generation_pb2 as pb
from outrider.protos import generation_pb2_grpc as stubs
from outrider.shared import pair
from outrider.shared.config.schema import Config
from outrider.shared.config.telemetry import TelemetryConfig
from outrider.shared.core.types import Decoding

MODES = ("off", "sampled out", "traced")
SETTLE_SECONDS = 0.7
"""Pause after a request, so that its spans are sent before the next one starts."""
RATE = 2000
RATE_SECONDS = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the study's flags."""
    parser.add_argument("--k", type=int, default=4, help="draft tokens per proposal (default: 4)")
    parser.add_argument("--prompts", type=int, default=10, help="held-out prompts (default: 10)")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--json", type=Path, help="write all figures to this file")


def run(args: argparse.Namespace, config: Config) -> int:
    """Runs the study; returns the exit status."""
    prompts = [str(entry["text"]) for entry in pair.heldout_prompts()]
    prompts = prompts[:: max(1, len(prompts) // args.prompts)][: args.prompts]
    with collector() as (endpoint, counts):
        figures = cost(config, endpoint, prompts, args.max_new_tokens, args.repeats, args.k)
        figures["collector"] = counts()
    for name, sampled in (("rate", True), ("rate_sampled_out", False)):
        with collector() as (endpoint, counts):
            figures[name] = at_rate(endpoint, counts, sampled=sampled)
    figures["hardware"] = hardware.describe()
    print(table(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def cost(
    config: Config, endpoint: str, prompts: Sequence[str], tokens: int, repeats: int, k: int
) -> dict[str, Any]:
    """Throughput and processor time in each mode, and ratios to "off" within the same prompt."""
    off = dataclasses.replace(config, telemetry=TelemetryConfig(log_level="warning"))
    on = dataclasses.replace(
        config,
        telemetry=TelemetryConfig(log_level="warning", traces="otlp-grpc", endpoint=endpoint),
    )
    speeds: dict[str, list[float]] = {mode: [] for mode in MODES}
    worked: dict[str, float] = dict.fromkeys(MODES, 0.0)
    rounds = 0
    with (
        deployment(off) as plain,
        deployment(on) as seen,
        grpc.insecure_channel(plain) as plain_channel,
        grpc.insecure_channel(seen) as seen_channel,
    ):
        stub = {
            "off": stubs.GenerationStub(plain_channel),
            "sampled out": stubs.GenerationStub(seen_channel),
            "traced": stubs.GenerationStub(seen_channel),
        }
        for repeat in range(repeats + 1):
            for prompt in prompts:
                order = random.Random(f"{repeat} {prompt}").sample(MODES, len(MODES))
                for mode in order:
                    before = processor_seconds()
                    seconds, count = _request(stub[mode], prompt, tokens, k, mode)
                    time.sleep(SETTLE_SECONDS)
                    if repeat:  # the first is for warming up
                        speeds[mode].append(tokens / seconds)
                        worked[mode] += processor_seconds() - before
                        rounds += count if mode == "traced" else 0
    ratios = {
        mode: [one / base for one, base in zip(speeds[mode], speeds["off"], strict=True)]
        for mode in MODES[1:]
    }
    return {
        "k": k,
        "requests": len(speeds["off"]),
        "processor_seconds": worked,
        "traced_rounds": rounds,
        "tokens_per_second": {mode: statistics.median(speeds[mode]) for mode in MODES},
        "cost": {
            mode: {
                "median": 1 - statistics.median(ratios[mode]),
                # Of the median, by resampling: what differs by less is noise.
                "interval95": [1 - one for one in reversed(_interval(ratios[mode]))],
            }
            for mode in ratios
        },
    }


def at_rate(endpoint: str, counts: Any, *, sampled: bool = True) -> dict[str, Any]:
    """Made-up rounds at ``RATE`` a second through observer, exporter and collector.

    ``sampled`` False: the client's ``traceparent`` says that they are not to be traced.
    """
    from outrider.coordinator.telemetry.observer import TelemetryObserver
    from outrider.shared.telemetry.setup import Telemetry

    telemetry = Telemetry(
        TelemetryConfig(traces="otlp-grpc", endpoint=endpoint, sample_ratio=1.0), "coordinator"
    )
    observer = TelemetryObserver(telemetry)
    observer.request_started("r", "" if sampled else f"00-{'ab' * 16}-{'cd' * 8}-00")
    total = int(RATE * RATE_SECONDS)
    spent = 0.0
    start, cpu = time.perf_counter(), time.process_time()
    for number in range(total):
        due = start + number / RATE
        while (wait := due - time.perf_counter()) > 0:
            time.sleep(wait)
        before = time.perf_counter()
        observer.round(_round(number, observer.traceparent(number, ["r"])))
        spent += time.perf_counter() - before
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    observer.request(_end(total))
    telemetry.shutdown()
    got = counts()
    # A round and its accept; queue, prefill and the request.
    made = 2 * total + 3 if sampled else 0
    return {
        "rounds_per_second": total / seconds,
        "spans": made,
        "received": sum(got.values()),
        "dropped": made - sum(got.values()),
        "event_loop_us_per_round": 1e6 * spent / total,
        "processor_us_per_round": 1e6 * cpu / total,
    }


def processor_seconds() -> float:
    """Processor time of all children of this process so far; 0 where the system can't tell."""
    total = 0
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
                with contextlib.suppress(OSError):
                    total += int(task.read_text().split()[0])
    return total / 1e9


@contextmanager
def collector() -> Iterator[tuple[str, Any]]:
    """A collector in a process of its own: its endpoint, and a function for spans by name."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_collect, args=(theirs,), daemon=True)
    process.start()

    def counts() -> dict[str, int]:
        ours.send("counts")
        found: dict[str, int] = ours.recv()
        return found

    try:
        yield f"http://127.0.0.1:{ours.recv()}", counts
    finally:
        with contextlib.suppress(OSError):
            ours.send("stop")
        process.join(10)


def table(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    worked = figures["processor_seconds"]
    speed = tables.number(figures["tokens_per_second"]["off"], 1)
    rows = [["off", speed, "-", "-", "-"]]
    for mode in MODES[1:]:
        one = figures["cost"][mode]
        low, high = one["interval95"]
        speed = tables.number(figures["tokens_per_second"][mode], 1)
        more = f"{worked[mode] / worked['off'] - 1:.2%}" if worked["off"] else "-"
        rows.append([mode, speed, f"{one['median']:.2%}", f"{low:.2%} to {high:.2%}", more])
    rate, out = figures["rate"], figures["rate_sampled_out"]
    return (
        tables.markdown(["telemetry", "tokens/s", "cost", "95 % interval", "processor"], rows)
        + "\n\ncost: throughput lost; processor: more time of all processes, the collector's too"
        + f"\n\n{figures['traced_rounds']} rounds traced at K = {figures['k']}. At "
        f"{rate['rounds_per_second']:.0f} rounds/s: {rate['dropped']} of {rate['spans']} spans "
        f"dropped, {rate['event_loop_us_per_round']:.1f} µs a round on the event loop, "
        f"{rate['processor_us_per_round']:.1f} µs of processor time with export. Sampled out: "
        f"{out['event_loop_us_per_round']:.1f} µs a round on the event loop"
    )


def _request(stub: Any, prompt: str, tokens: int, k: int, mode: str) -> tuple[float, int]:
    """Seconds from the first message to the last, and the rounds in between."""
    request = pb.GenerateRequest(
        prompt=prompt,
        stopping=pb.StopConditions(max_new_tokens=tokens, ignore_eos=True),
        speculation=pb.SpeculationParameters(k=k),
    )
    metadata = []
    if mode != "off":
        flag = "01" if mode == "traced" else "00"
        ids = f"{secrets.token_hex(16)}-{secrets.token_hex(8)}"
        metadata.append(("traceparent", f"00-{ids}-{flag}"))
    start = time.perf_counter()
    rounds = 0
    for response in stub.Generate(request, metadata=metadata):
        if response.WhichOneof("event") == "finished":
            rounds = response.finished.speculation.rounds
    return time.perf_counter() - start, rounds


def _interval(values: Sequence[float], draws: int = 2000) -> list[float]:
    """The 95 % interval of the median, by the bootstrap (Efron 1979)."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(draws))
    return [medians[int(0.025 * draws)], medians[int(0.975 * draws)]]


def _collect(pipe: Any) -> None:
    """The collector's process: counts spans by the first word of their name."""
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_pb
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as trace_grpc

    counts: dict[str, int] = {}

    class Service(trace_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        name = span.name.split(" ")[0]
                        counts[name] = counts.get(name, 0) + 1
            return trace_pb.ExportTraceServiceResponse()

    server = grpc.server(futures.ThreadPoolExecutor(1))
    trace_grpc.add_TraceServiceServicer_to_server(Service(), server)
    pipe.send(server.add_insecure_port("127.0.0.1:0"))
    server.start()
    with contextlib.suppress(EOFError):
        while pipe.recv() == "counts":
            pipe.send(dict(counts))
    server.stop(None).wait()
    sys.stderr.flush()


def _round(number: int, traceparent: str) -> RoundRecord:
    start = time.time_ns()
    draft = ServiceTiming(start + 10_000, start + 110_000, 8e-5, 9e-5, 4)
    verify = ServiceTiming(start + 120_000, start + 420_000, 2.5e-4, 2.7e-4, 5)
    one = SequenceRound("r", 0, 1, 10 + 4 * number, 4, 4, 3, 4, 5, 1, 1, 1)
    return RoundRecord(number, traceparent, start, start + 450_000, draft, verify, (one,), 0)


def _end(rounds: int) -> RequestRecord:
    now = time.time_ns()
    return RequestRecord(
        request_id="r", sample_index=0, sequence_id=1, traceparent="", arrived_ns=now - 10**9,
        admitted_ns=now - 9 * 10**8, first_token_ns=now - 8 * 10**8, finished_ns=now,
        prompt_tokens=10, cached_prompt_tokens=0, completion_tokens=4 * rounds, reason="MAX_TOKENS",
        error="", k=4, rule="GREEDY", temperature=0.0, rounds=rounds,
        proposed_by_position=(rounds,) * 4, accepted_by_position=(rounds,) * 3 + (0,),
        decoding=Decoding(), max_new_tokens=4 * rounds, num_samples=1,
    )  # fmt: skip
