"""``outrider bench plant``: writes a planted checkpoint, see ``planted``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from outrider.coordinator.bench.models.planted import PlantSpec, save
from outrider.coordinator.bench.models.shapes import SHAPES
from outrider.shared.config.schema import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="base and draft share it (default: 0)")
    parser.add_argument(
        "--agreement", type=_share, help="makes a draft with this greedy acceptance rate, 0 to 1"
    )
    parser.add_argument(
        "--spread", type=float, default=0.0,
        help="softness of the next-token law: a successor is about exp(-1/spread) as likely as "
        "the one before it; 0 leaves one (default: 0)",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")


def run(args: argparse.Namespace, config: Config) -> int:
    """Writes the folder; returns the exit status."""
    began = time.perf_counter()
    spec = PlantSpec(args.shape, args.seed, args.agreement, args.spread, args.dtype)
    save(spec, args.out, lambda message: print(message, file=sys.stderr))
    size = spec.size.step_bytes
    print(
        f"{args.out}: {args.shape}, {size / 1e9:.3f} GB read per step in 16-bit types, "
        f"{time.perf_counter() - began:.1f} s"
    )
    return 0


def _share(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"got {text}; must be in 0..1")
    return value
