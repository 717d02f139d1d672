"""The flags of ``outrider generate`` that say what is continued and how tokens are chosen."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from outrider.coordinator.cli.argument_types import number, whole
from outrider.shared.core import rules


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
    what.add_argument("--echo", action="store_true", help="print the prompt too")

    choice = parser.add_argument_group("how tokens are chosen")
    choice.add_argument("--temperature", type=number(0.0, math.inf), help="0 is greedy")
    choice.add_argument("--top-k", type=whole(0, 2**31 - 1), help="0 keeps all")
    choice.add_argument("--top-p", type=number(0.0, 1.0, low_open=True))
    choice.add_argument("--min-p", type=number(0.0, 1.0, high_open=True))
    choice.add_argument("--repetition-penalty", type=number(0.0, math.inf, low_open=True))
    choice.add_argument("--presence-penalty", type=number(-2.0, 2.0))
    choice.add_argument("--frequency-penalty", type=number(-2.0, 2.0))
    choice.add_argument(
        "--logit-bias", type=_bias, action="append", metavar="ID=BIAS", help="may be repeated"
    )
    choice.add_argument(
        "--bad-words", type=token_ids, action="append", metavar="IDS", help="never these in a row"
    )
    choice.add_argument("--min-new-tokens", type=whole(0, 2**31 - 1))
    choice.add_argument("--seed", type=whole(0, 2**64 - 1))
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
