"""``outrider plan``: what fits on a GPU, and which K its memory's speed favours."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from outrider.coordinator.bench.models.shapes import SHAPES
from outrider.coordinator.cli import capacity
from outrider.coordinator.cli.capacity import GIB, GPUS, Memory, read_model
from outrider.shared.config.ngram import is_ngram


def add_parser(commands: Any) -> None:
    """Declares ``plan`` among the subcommands of a command line."""
    parser = commands.add_parser("plan", help="what fits on a GPU, and which K it favours")
    parser.add_argument("--gpu", choices=sorted(GPUS), required=True)
    parser.add_argument("--base", required=True, help=f"folder, or one of {', '.join(SHAPES)}")
    parser.add_argument(
        "--draft", help="likewise, or ngram, which needs no GPU; without one the base alone"
    )
    parser.add_argument("--sequences", type=int, default=4, help="at once (default: 4)")
    parser.add_argument("--context", type=int, default=4096, help="tokens each (default: 4096)")
    parser.add_argument(
        "--acceptance", type=float, default=0.8, help="expected acceptance rate (default: 0.8)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the plan; exit status 1 where it does not fit."""
    from_text = args.draft is not None and is_ngram(args.draft)
    found = capacity.plan(
        GPUS[args.gpu],
        read_model(args.base),
        read_model(args.draft) if args.draft and not from_text else None,
        sequences=args.sequences,
        context=args.context,
        acceptance=args.acceptance,
        from_text=from_text,
    )
    print(json.dumps(asdict(found)) if args.json else describe(found, args))
    return 0 if found.fits else 1


def describe(found: capacity.Plan, args: argparse.Namespace) -> str:
    """The plan as text."""
    lines = [f"{found.gpu}, {found.dtype}: {_gib(found.memory)} for programs", ""]
    columns: Sequence[tuple[str, Memory]] = [("base", found.base)]
    if found.draft is not None:
        columns = [*columns, ("draft", found.draft)]
    lines.append("".join(f"{name:>12}" for name in ("", *(n for n, _ in columns))))
    for part in ("weights", "arena", "workspace", "graphs", "context", "total"):
        values = "".join(f"{_gib(getattr(m, part)):>12}" for _, m in columns)
        lines.append(f"{part:>12}{values}")
    verdict = "fits" if found.fits else "does not fit"
    lines += [
        "",
        f"{args.sequences} sequences of {args.context} tokens: {verdict}, "
        f"{_gib(abs(found.free))} {'left' if found.fits else 'missing'}; "
        f"at most {found.most_sequences} sequences",
        "",
        f"Ceilings of one sequence, acceptance {args.acceptance:g}:",
    ]
    for speed in found.speeds:
        mark = "  <- best" if speed.k == found.best_k else ""
        lines.append(
            f"  K = {speed.k}: {speed.tokens_per_second:7.1f} tokens/s  {speed.gain:.2f}x{mark}"
        )
    return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
