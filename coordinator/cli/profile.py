"""``outrider profile``: the command line only; what it needs is imported when it runs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Adds ``profile`` to the subparsers of ``outrider``."""
    parser = commands.add_parser("profile", help="show where the time of a request went")
    parser.add_argument("file", type=Path, help="as written by generate --profile")
    parser.add_argument(
        "--chrome", type=Path, metavar="FILE", help="write a trace for ui.perfetto.dev"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    from outrider.coordinator.profile.file import read, summary

    record = read(args.file)
    if args.chrome is not None:
        from outrider.coordinator.profile.chrome_trace import trace

        args.chrome.write_text(json.dumps(trace(record), separators=(",", ":")) + "\n")
        print(f"{args.chrome}: open it at https://ui.perfetto.dev", file=sys.stderr)
    if args.json:
        print(json.dumps({key: record[key] for key in record if key != "rounds"}, indent=1))
    else:
        print(summary(record))
    return 0
