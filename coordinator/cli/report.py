"""``outrider report``: the command line only; what it needs is imported when it runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Adds ``report`` to the subparsers of ``outrider``."""
    parser = commands.add_parser("report", help="make one HTML page of a profile")
    parser.add_argument("file", type=Path, help="as written by generate --profile")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: FILE with the ending .html"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    from outrider.coordinator.profile.file import read
    from outrider.coordinator.profile.html import page

    output = args.output or args.file.with_suffix(".html")
    output.write_text(page(read(args.file)), "utf-8")
    print(f"{output}: open it in a browser", file=sys.stderr)
    return 0
