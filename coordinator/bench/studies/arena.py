"""``outrider bench arena``: what the arena's operations cost, and what they save.

Bookkeeping: rollback against the number of rejected tokens, admission and release with many live
extents, and how full a long random workload gets the arena, against a packer that may move
extents at will. Then appending one token's keys and values, and the same forward over it, against
transformers' DynamicCache and StaticCache (see ``appending``).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from outrider.coordinator.bench import hardware, tables
from outrider.shared.config.argument_types import several, whole
from outrider.shared.config.schema import Config
from outrider.shared.core.errors import CapacityError
from outrider.shared.kv.arena import Arena, PoolPlan
from outrider.shared.kv.slots import SlotAllocator

REJECTED = (1, 4, 16, 64, 256, 1024, 4096, 16384)
LIVE = (10, 100, 1000, 4000)
_PASSES = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    counts = several(whole(1))
    parser.add_argument("--arena-device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument(
        "--lengths",
        type=counts,
        default=[256, 1024, 4096, 16384],
        help="tokens already cached",
    )
    parser.add_argument("--batches", type=counts, default=[1, 8], help="sequences at once")
    parser.add_argument("--steps", type=int, default=30, help="steps of each measurement")
    parser.add_argument("--layers", type=int, default=4, help="of the model measured with")
    parser.add_argument("--hidden", type=int, default=512, help="of the model measured with")
    parser.add_argument(
        "--bookkeeping-only", action="store_true", help="no model: leave out appending"
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")


def run(args: argparse.Namespace, config: Config | None = None) -> int:
    """Measures and prints; returns the exit status."""
    figures = bookkeeping()
    print(bookkeeping_tables(figures))
    if not args.bookkeeping_only:
        from outrider.coordinator.bench.studies import appending
        from outrider.shared.model.loading import choose_device

        figures |= appending.measure(
            device=choose_device(args.arena_device),
            lengths=args.lengths,
            batches=args.batches,
            steps=args.steps,
            layers=args.layers,
            hidden=args.hidden,
        )
        print(appending.table(figures))
    figures |= hardware.provenance()
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def bookkeeping() -> dict[str, Any]:
    """Rollback, admission and fragmentation; seconds, and shares of the arena."""
    # In turns: a passing load on the machine would else fall on one number of tokens alone.
    passes = [[rollback_seconds(n) for n in REJECTED] for _ in range(_PASSES)]
    return {
        "rollback": [
            {"rejected": n, "seconds": min(seconds)}
            for n, *seconds in zip(REJECTED, *passes, strict=True)
        ],
        "admission": [{"live": n} | admission_seconds(n) for n in LIVE],
        "fragmentation": [fragmentation(kind) for kind in ("uniform", "skewed", "bimodal")],
    }


def bookkeeping_tables(figures: dict[str, Any]) -> str:
    """The figures of ``bookkeeping`` as Markdown."""
    rollback = tables.markdown(
        ["tokens rejected", "rollback, ns per sequence"],
        [[f"{r['rejected']:,}", f"{r['seconds'] * 1e9:,.0f}"] for r in figures["rollback"]],
    )
    admission = tables.markdown(
        ["live extents", "admit, µs", "free, µs"],
        [
            [f"{r['live']:,}", f"{r['admit'] * 1e6:.2f}", f"{r['free'] * 1e6:.2f}"]
            for r in figures["admission"]
        ],
    )
    fragmentation = tables.markdown(
        ["sizes", "arena used", "ideal packer", "of ideal", "refused for fragmentation"],
        [
            [
                r["sizes"],
                f"{r['used']:.1%}",
                f"{r['ideal']:.1%}",
                f"{r['used'] / r['ideal']:.1%}",
                f"{r['refused_for_fragmentation']:.2%}",
            ]
            for r in figures["fragmentation"]
        ],
    )
    return f"{rollback}\n\n{admission}\n\n{fragmentation}\n"


def rollback_seconds(rejected: int) -> float:
    """Time of one rollback that takes back so many tokens, the best of many runs."""
    arena = Arena([PoolPlan(1 << 16)])
    extent = arena.admit(1 << 15)
    extent.advance(20_000)
    back = extent.valid_len - rejected

    def once() -> None:
        extent.valid_len = 20_000
        arena.rollback(extent, back)

    def idle() -> None:
        extent.valid_len = 20_000

    return max(0.0, _best(once) - _best(idle))


def admission_seconds(live: int) -> dict[str, float]:
    """Time to admit and to free an extent among ``live`` others, with as many holes between."""
    draw = random.Random(live)
    arena = Arena([PoolPlan(live * 2200)])
    extents = [arena.admit(draw.randint(64, 1024)) for _ in range(2 * live)]
    draw.shuffle(extents)
    for extent in extents[live:]:
        arena.free(extent)
    extents = extents[:live]
    admit, free = [], []
    for _ in range(2000):
        began = time.perf_counter()
        extent = arena.admit(draw.randint(64, 1024))
        admitted = time.perf_counter()
        admit.append(admitted - began)
        place = draw.randrange(len(extents))
        extent, extents[place] = extents[place], extent
        began = time.perf_counter()
        arena.free(extent)
        free.append(time.perf_counter() - began)
    return {"admit": sorted(admit)[1000], "free": sorted(free)[1000]}


def fragmentation(sizes: str, *, tokens: int = 100_000, requests: int = 20_000) -> dict[str, Any]:
    """How full a saturated arena is over a long random workload.

    Requests wait in one queue, first come, first served; each lives for a random number of
    steps. The ideal packer admits the same queue whenever the *sum* of what is free is enough:
    it is what moving extents about could reach at best.
    """
    draw = random.Random(7)
    asked = [(_size(sizes, draw), draw.randint(1, 200)) for _ in range(requests)]
    allocator = SlotAllocator(tokens)

    def reserve(size: int) -> int | None:
        try:
            return allocator.reserve(size)
        except CapacityError:
            return None

    used, refused, tried = _serve(asked, tokens, reserve, allocator.free)
    ideal, _, _ = _serve(asked, tokens, lambda size: 0, lambda start: None)
    return {
        "sizes": sizes,
        "tokens": tokens,
        "requests": requests,
        "used": used,
        "ideal": ideal,
        "refused_for_fragmentation": refused / tried,
    }


def _serve(
    asked: Sequence[tuple[int, int]],
    tokens: int,
    reserve: Callable[[int], int | None],
    free: Callable[[int], None],
) -> tuple[float, int, int]:
    """Serves the queue; returns the mean share used while it is full, how often the head of the
    queue did not fit although the sum of what was free was enough, and how often it was tried."""
    ends: dict[int, list[tuple[int, int]]] = {}
    step = used = place = refused = tried = 0
    shares = []
    while place < len(asked):
        for size, start in ends.pop(step, ()):
            free(start)
            used -= size
        while place < len(asked):
            size, lifetime = asked[place]
            if used + size > tokens:
                break
            tried += 1
            found = reserve(size)
            if found is None:
                refused += 1
                break
            ends.setdefault(step + lifetime, []).append((size, found))
            used += size
            place += 1
        if place < len(asked):
            shares.append(used / tokens)
        step += 1
    warm = shares[len(shares) // 10 :]
    return sum(warm) / len(warm), refused, tried


def _size(kind: str, draw: random.Random) -> int:
    if kind == "uniform":
        return draw.randint(64, 2048)
    if kind == "skewed":
        return min(8192, int(draw.lognormvariate(6.0, 1.0)) + 16)
    return draw.choice((128, 128, 128, 4096))


def _best(call: Callable[[], None], calls: int = 2000, repeats: int = 20) -> float:
    """Seconds of one call: the best of ``repeats`` means over ``calls``."""
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - began) / calls)
    return best
