"""The flags of ``outrider generate`` that say what is continued and how tokens are chosen."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from outrider.shared.config.argument_types import number, whole
from outrider.shared.core import rules
from outrider.shared.core.parameters import Kind, Number, TokenBiases, TokenLists, Whole
from outrider.shared.core.types import PARAMETERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares them; see docs/decoding.md."""
    what = parser.add_argument_group("what is continued")
    what.add_argument("prompt", metavar="PROMPT", nargs="?", help="text; - reads it from stdin")
    what.add_argument("--token-ids", action="store_true", help="PROMPT is token ids, as 5,17,3")
    what.add_argument("--chat", action="store_true", help="PROMPT is a message of a user")
    what.add_argument(
        "--messages", type=Path, metavar="FILE", help="a conversation: JSON list of role, content"
    )
    what.add_argument(
        "--resume", type=token_ids, metavar="IDS", help="tokens of an interrupted run"
    )
    what.add_argument(
        "--cache-salt", default="", metavar="TEXT", help="share cached prompts only with this salt"
    )
    what.add_argument("--echo", action="store_true", help="print the prompt too")

    choice = parser.add_argument_group("how tokens are chosen")
    for name, one in PARAMETERS.items():
        choice.add_argument(flag_of(name), help=one.help, **_reading(one.kind))
    choice.add_argument("--n", type=whole(1), metavar="COUNT", help="samples of the prompt")

    end = parser.add_argument_group("when it ends")
    end.add_argument("--max-new-tokens", type=whole(1))
    end.add_argument("--stop", action="append", metavar="TEXT", help="end before this text")
    end.add_argument("--stop-token", type=whole(0), action="append", metavar="ID")
    end.add_argument("--ignore-eos", action="store_true", help="go on past end of sequence")

    draft = parser.add_argument_group("speculation")
    draft.add_argument("--k", type=whole(0), help="draft tokens per proposal; unset adapts")
    draft.add_argument("--no-draft", action="store_true", help="the base alone")
    draft.add_argument("--rule", choices=rules.words(), default=rules.AUTO)


def flag_of(name: str) -> str:
    """The flag of a sampling parameter."""
    return f"--{name.replace('_', '-')}"


def _reading(kind: Kind) -> dict[str, Any]:
    """How ``argparse`` reads a parameter of that kind; what is not given stays None."""
    match kind:
        case Number():
            ends = {"low_open": kind.low_open, "high_open": kind.high_open}
            return {"type": number(kind.low, kind.high, **ends)}
        case Whole():
            return {"type": whole(kind.low, kind.high)}
        case TokenBiases():
            return {"type": _bias, "action": "append", "metavar": "ID=BIAS"}
        case TokenLists():
            return {"type": token_ids, "action": "append", "metavar": "IDS"}
    raise TypeError(f"no flag reads a {type(kind).__name__}")


def token_ids(text: str) -> list[int]:
    """Reads token ids, separated by commas."""
    return [_id(one) for one in text.split(",")]


_id: Callable[[str], int] = whole(0, 2**32 - 1)


def _bias(text: str) -> tuple[int, float]:
    """Reads ``ID=BIAS``."""
    token, sign, bias = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"got {text!r}; must be ID=BIAS, as 5=-2.5")
    return _id(token), number(-math.inf, math.inf)(bias)
