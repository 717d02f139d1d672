"""Runs random cases for a time or up to a number, and tells what was wrong.

Each case is a number: ``--first N --cases 1`` runs one again. Exit status 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from outrider_testing.battery.cases import draw_case
from outrider_testing.battery.stack import Outcome, describe, run_case


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m outrider_testing.battery", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="how long at most")
    parser.add_argument("--cases", type=int, default=None, help="how many at most")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--step", type=int, default=1, help="so that several may run side by side")
    parser.add_argument("--json", type=Path, default=None, help="file for the counts")
    args = parser.parse_args(argv)
    until = time.monotonic() + 60 * args.minutes
    done: list[Outcome] = []
    number = args.first
    while time.monotonic() < until and (args.cases is None or len(done) < args.cases):
        done.append(run_safely(number))
        for fault in done[-1].faults:
            print(f"case {number}: {fault}\n  {describe(done[-1].case)}", flush=True)
        number += args.step
    counts = counts_of(done)
    print(json.dumps(counts, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(counts, indent=1) + "\n")
    return 1 if counts["faults"] else 0


def run_safely(number: int) -> Outcome:
    """``run_case`` in a folder of its own; what it raises is a fault of the case."""
    with tempfile.TemporaryDirectory(prefix="or-", dir="/tmp") as folder:
        try:
            return run_case(number, Path(folder))
        except Exception:
            return Outcome(draw_case(number), faults=[traceback.format_exc()])


def counts_of(done: Sequence[Outcome]) -> dict[str, object]:
    """What ran, for the record."""
    kinds: Counter[str] = Counter()
    for one in done:
        kinds.update(one.kinds)
    return {
        "cases": len(done),
        "samples": sum(one.judged for one in done),
        "tokens": sum(one.tokens for one in done),
        "accepted": sum(one.accepted for one in done),
        "ties": sum(one.ties for one in done),
        "refused": sum(one.refused for one in done),
        "faults": sum(len(one.faults) for one in done),
        "architectures": len({one.case.architecture for one in done}),
        "by_family": Counter(one.case.family for one in done),
        "by_link": Counter(one.case.link for one in done),
        "by_draft": Counter(one.case.draft for one in done),
        "by_rule_and_end": kinds,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    sys.exit(main())
