"""Speculation at each K against the base alone, through the public API of all three processes.

The variants take turns within every repeat, so that a machine whose speed drifts slows them
all alike; what is compared are medians over repeats within one run.
"""

from __future__ import annotations

import asyncio
import secrets
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol, TypeVar

import grpc

from outrider.protos import generation_pb2 as pb
from outrider.protos import generation_pb2_grpc as rpc
from outrider.shared.core.model_facts import read_description

VariantT = TypeVar("VariantT")


@dataclass(frozen=True, slots=True)
class Workload:
    """What every variant runs; a prompt is text or token ids."""

    prompts: Sequence[str | Sequence[int]]
    max_new_tokens: int
    temperature: float = 0.0
    rule: int = pb.ACCEPTANCE_RULE_UNSPECIFIED
    seed: int = 0
    concurrency: int = 1
    ignore_eos: bool = True


@dataclass(slots=True)
class Run:
    """One variant over all prompts of the workload, once."""

    seconds: float = 0.0
    tokens: int = 0
    rounds: int = 0
    proposed: int = 0
    accepted: int = 0
    accepted_by_position: list[int] = field(default_factory=list)
    proposed_by_position: list[int] = field(default_factory=list)
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    overhead_seconds: float = 0.0
    first_token_seconds: list[float] = field(default_factory=list)
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """When token ids came, by ``time.perf_counter``, and how many."""
    ends: list[float] = field(default_factory=list)
    """When each request was done."""
    outputs: list[tuple[int, ...]] = field(default_factory=list)

    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    def decode_speed(self) -> float:
        """Tokens per second while all requests decode: from the first token to the first end."""
        begin, end = min(at for at, _ in self.arrivals), min(self.ends)
        return sum(count for at, count in self.arrivals if begin < at <= end) / (end - begin)


class Peer(Protocol):
    """Other programs that do the same work; ``studies/peers`` has them."""

    @property
    def names(self) -> Sequence[str]:
        """The first of them is the base alone."""

    def run(self, name: str, workload: Workload) -> Run:
        """All prompts of the workload, one after the other."""


def in_turns(
    variants: Sequence[VariantT], warmup: int, repeats: int
) -> Iterator[tuple[VariantT, bool]]:
    """All variants in each repeat, each time begun with another; and whether the run counts."""
    for repeat in range(-warmup, repeats):
        turn = repeat % len(variants)
        for variant in (*variants[turn:], *variants[:turn]):
            yield variant, repeat >= 0


async def measure(
    target: str,
    workload: Workload,
    ks: Sequence[int | None],
    *,
    repeats: int,
    warmup: int,
    peers: Peer | None = None,
) -> dict[str, object]:
    """Runs the workload at every K in ``ks`` (None: the server's choice), ``repeats`` times.

    Returns figures per K: medians over repeats of tokens per second and of the ratio to the base
    alone within the same repeat, and whether the tokens were those of K = 0. With ``peers`` the
    base alone is whichever was faster in that repeat, ours or theirs.
    """
    names = peers.names if peers is not None else ()
    variants = [*ks, *names]
    runs: dict[int | str | None, list[Run]] = {one: [] for one in variants}
    async with grpc.aio.insecure_channel(target) as channel:
        stub = rpc.GenerationStub(channel)
        for one, counts in in_turns(variants, warmup, repeats):
            if isinstance(one, str):
                assert peers is not None
                run = await asyncio.to_thread(peers.run, one, workload)
            else:
                run = await run_once(stub, workload, one)
            if counts:
                runs[one].append(run)
        info = await stub.Info(pb.InfoRequest())
    alone = [runs[one] for one in (0, *names[:1]) if one in runs]
    fastest = [max(some, key=Run.speed) for some in zip(*alone, strict=True)]
    base = runs.get(0)
    return {
        "variants": [summary(k, runs[k], base, fastest) for k in ks],
        "peers": [{"name": name, **summary(None, runs[name], base, fastest)} for name in names],
        "base": asdict(read_description(info.base)),
        "draft": asdict(read_description(info.draft)) if info.HasField("draft") else None,
        "link": info.link,
    }


async def described(target: str) -> pb.InfoResponse:
    """What the coordinator at ``target`` says of itself."""
    async with grpc.aio.insecure_channel(target) as channel:
        found: pb.InfoResponse = await rpc.GenerationStub(channel).Info(pb.InfoRequest())
        return found


async def run_once(stub: rpc.GenerationAsyncStub, workload: Workload, k: int | None) -> Run:
    """All prompts of the workload, once."""
    run = Run()
    gate = asyncio.Semaphore(workload.concurrency)

    async def one(index: int) -> tuple[int, ...]:
        async with gate:
            request = _request(workload, index, k)
            # Whatever ran before, each run takes in its prompts, as those do that it is beside.
            request.cache_salt = secrets.token_hex(8)
            return await _generate(stub, request, run)

    start = time.perf_counter()
    run.outputs = list(await asyncio.gather(*(one(i) for i in range(len(workload.prompts)))))
    run.seconds = time.perf_counter() - start
    return run


def _request(workload: Workload, index: int, k: int | None) -> pb.GenerateRequest:
    return generate_request(
        workload.prompts[index],
        max_new_tokens=workload.max_new_tokens,
        temperature=workload.temperature,
        seed=workload.seed + index,
        ignore_eos=workload.ignore_eos,
        rule=workload.rule,
        k=k,
    )


def generate_request(
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    ignore_eos: bool,
    k: int | None,
    rule: int = pb.ACCEPTANCE_RULE_UNSPECIFIED,
) -> pb.GenerateRequest:
    """The message that asks for a continuation of text or token ids; ``k``: None is the
    server's choice."""
    speculation = pb.SpeculationParameters(rule=rule)  # type: ignore[arg-type]
    if k is not None:
        speculation.k = k
    return pb.GenerateRequest(
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=None if isinstance(prompt, str) else pb.TokenIds(ids=prompt),
        sampling=pb.SamplingParameters(temperature=temperature, seed=seed),
        stopping=pb.StopConditions(max_new_tokens=max_new_tokens, ignore_eos=ignore_eos),
        speculation=speculation,
    )


async def _generate(
    stub: rpc.GenerationAsyncStub, request: pb.GenerateRequest, run: Run
) -> tuple[int, ...]:
    start = time.perf_counter()
    first = None
    tokens: list[int] = []
    async for message in stub.Generate(request):
        event = message.WhichOneof("event")
        if event == "delta":
            if first is None and message.delta.token_ids:
                first = time.perf_counter() - start
                run.first_token_seconds.append(first)
            tokens.extend(message.delta.token_ids)
            run.arrivals.append((time.perf_counter(), len(message.delta.token_ids)))
        elif event == "finished":
            stats = message.finished.speculation
            run.tokens += message.finished.usage.completion_tokens
            run.rounds += stats.rounds
            run.proposed += stats.proposed
            run.accepted += stats.accepted
            _add(run.proposed_by_position, stats.proposed_by_position)
            _add(run.accepted_by_position, stats.accepted_by_position)
            run.draft_seconds += stats.seconds.draft
            run.verify_seconds += stats.seconds.verify
            run.overhead_seconds += stats.seconds.overhead
            run.ends.append(time.perf_counter())
    return tuple(tokens)


def _add(total: list[int], more: Sequence[int]) -> None:
    total.extend([0] * (len(more) - len(total)))
    for i, n in enumerate(more):
        total[i] += n


def summary(
    k: int | None, runs: list[Run], base: list[Run] | None, alone: list[Run] | None = None
) -> dict[str, object]:
    """Medians of one variant, and the ratio to ``alone`` (else ``base``) repeat by repeat."""
    speeds = [r.speed() for r in runs]
    proposed = sum(r.proposed for r in runs)
    rounds = sum(r.rounds for r in runs)
    by_position = [0] * max((len(r.proposed_by_position) for r in runs), default=0)
    offered = list(by_position)
    for run in runs:
        _add(by_position, run.accepted_by_position)
        _add(offered, run.proposed_by_position)
    made: dict[str, object] = {
        "k": k,
        "tokens_per_second": statistics.median(speeds),
        "tokens_per_second_runs": speeds,
        "first_token_seconds": statistics.median(
            [t for r in runs for t in r.first_token_seconds] or [float("nan")]
        ),
        "acceptance_rate": sum(r.accepted for r in runs) / proposed if proposed else None,
        "mean_accepted_length": sum(r.tokens for r in runs) / rounds if rounds else None,
        "acceptance_by_position": [a / p for a, p in zip(by_position, offered, strict=True) if p],
        "round_ms": {
            "draft": _per_round(r.draft_seconds / max(r.rounds, 1) for r in runs),
            "verify": _per_round(r.verify_seconds / max(r.rounds, 1) for r in runs),
            "overhead": _per_round(r.overhead_seconds / max(r.rounds, 1) for r in runs),
        },
    }
    alone = alone or base
    if alone:
        made["speedup"] = statistics.median(
            r.speed() / b.speed() for r, b in zip(runs, alone, strict=True)
        )
    if base is not None:
        made["same_tokens_as_base"] = all(
            r.outputs == b.outputs for r, b in zip(runs, base, strict=True)
        )
    return made


def _per_round(seconds: Iterable[float]) -> float:
    return 1e3 * statistics.median(seconds)
