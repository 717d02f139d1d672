"""The ``outrider bench`` command: speculation at each K against the base alone."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from outrider.coordinator.bench import hardware, tables
from outrider.coordinator.bench.token_ids import COMMON_IDS
from outrider.coordinator.telemetry import ceiling
from outrider.shared import pair
from outrider.shared.config.ngram import is_ngram
from outrider.shared.config.schema import Config
from outrider.shared.core import rules
from outrider.shared.core.errors import ConfigError
from outrider.shared.core.host import read_bandwidth

if TYPE_CHECKING:
    from outrider.coordinator.bench.studies.peers import Peers
    from outrider.coordinator.bench.workload import Run, Workload


_SAME = {True: "yes", False: "NO", None: "-"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of the plain ``outrider bench``."""
    parser.add_argument(
        "--ks",
        type=_ks,
        default=[0, 1, 2, 3, 4, 5, 6, 7, 8],
        help="K values, as 0,1,4 or 0-8; auto is the server's own choice (default: 0-8)",
    )
    parser.add_argument("--prompts", type=int, default=8, help="held-out prompts (default: 8)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="unmeasured repeats")
    parser.add_argument("--concurrency", type=int, default=1, help="requests at once")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rule", choices=rules.words(), default=rules.AUTO)
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        help="prompts of this many random token ids instead of held-out code, for models "
        "without text such as planted ones",
    )
    parser.add_argument(
        "--repetitive",
        action="store_true",
        help="prompts with a piece of held-out code three times and its beginning again, for texts "
        "that repeat what they have",
    )
    parser.add_argument(
        "--in-process",
        action="store_true",
        help="both models in this process: what splitting them costs is missing",
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="beside it transformers' generate on the same checkpoints, alone and assisted (with "
        "--draft ngram: by prompt lookup)",
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")


def measure_target(arguments: argparse.Namespace, target: str, config: Config) -> int:
    """Measures the coordinator at ``target`` and prints a table; returns the exit status.

    Raises ``ConfigError`` for what can't be measured.
    """
    from outrider.coordinator.bench.workload import measure

    workload = _workload(arguments)
    with _peers(arguments, workload, target, config) as peers:
        figures = asyncio.run(
            measure(
                target,
                workload,
                arguments.ks,
                repeats=arguments.repeats,
                warmup=arguments.warmup,
                peers=peers,
            )
        )
    return _report(arguments, workload, figures)


def check(arguments: argparse.Namespace) -> None:
    """Raises ``ConfigError`` for flags that do not go together."""
    if arguments.repetitive and arguments.prompt_tokens is not None:
        raise ConfigError("--repetitive: such prompts are code, and --prompt-tokens asks for ids")
    if not arguments.peers:
        return
    if arguments.target is not None:
        raise ConfigError("--peers: it loads the same checkpoints, and --target does not say which")
    if arguments.in_process:
        raise ConfigError("--peers: it is compared with the services, not with --in-process")
    if arguments.concurrency != 1:
        raise ConfigError(f"--concurrency: got {arguments.concurrency}; with --peers it must be 1")


@contextmanager
def _peers(
    arguments: argparse.Namespace, workload: Workload, target: str, config: Config
) -> Iterator[Peers | None]:
    if not arguments.peers:
        yield None
        return
    from outrider.coordinator.bench.studies.peers import Peers
    from outrider.coordinator.bench.workload import described
    from outrider.shared.model.locate import model_path

    ids = _token_ids(workload, config)
    draft = "" if is_ngram(config.draft.path) else model_path(config.draft.path)
    dtype = asyncio.run(described(target)).base.dtype
    peers = Peers(model_path(config.base.path), draft, dtype, ids)
    try:
        yield peers
    finally:
        peers.close()


def measure_in_process(arguments: argparse.Namespace, config: Config) -> int:
    """The same with both models in this process. Raises ``ConfigError`` for what it can't do."""
    if None in arguments.ks:
        raise ConfigError("--ks auto: K is chosen by a coordinator, and --in-process has none")
    if arguments.concurrency != 1:
        raise ConfigError(
            f"--concurrency: got {arguments.concurrency}; with --in-process it must be 1"
        )
    from outrider.coordinator.bench.studies.in_process import InProcess
    from outrider.coordinator.bench.workload import in_turns, summary

    workload = _workload(arguments)
    ids = _token_ids(workload, config)
    models = InProcess(config)
    runs: dict[int | None, list[Run]] = {k: [] for k in arguments.ks}
    for k, counts in in_turns(arguments.ks, arguments.warmup, arguments.repeats):
        run = models.run(workload, ids, k)
        if counts:
            runs[k].append(run)
    base = runs.get(0)
    figures: dict[str, object] = {
        "variants": [summary(k, runs[k], base) for k in arguments.ks],
        **models.describe(),
        "link": "in-process",
    }
    return _report(arguments, workload, figures)


def _workload(arguments: argparse.Namespace) -> Workload:
    from outrider.coordinator.bench.workload import Workload

    count = arguments.prompts
    return Workload(
        prompts=repetitive_prompts(count)
        if arguments.repetitive
        else prompts(count, arguments.prompt_tokens),
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        rule=rules.number_of(arguments.rule),
        concurrency=arguments.concurrency,
    )


def _token_ids(workload: Workload, config: Config) -> list[Sequence[int]]:
    """The prompts as the coordinator's tokenizer reads them."""
    from outrider.coordinator.requests.text.tokenizer import load_tokenizer

    encode = load_tokenizer(config.coordinator.tokenizer).encode
    return [encode(one) if isinstance(one, str) else one for one in workload.prompts]


def _report(arguments: argparse.Namespace, workload: Workload, figures: dict[str, object]) -> int:
    bandwidth = read_bandwidth("cpu")
    figures |= {
        **hardware.provenance(),
        "memory_read_bytes_per_second": bandwidth,
        "workload": {
            "prompts": len(workload.prompts),
            "max_new_tokens": workload.max_new_tokens,
            "concurrency": workload.concurrency,
            "temperature": workload.temperature,
            "rule": arguments.rule,
            "repeats": arguments.repeats,
        },
    }
    print(table(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def table(figures: dict) -> str:  # type: ignore[type-arg]
    """The figures as a Markdown table, with the share of the memory's ceiling."""
    rows = []
    base, draft = figures["base"], figures["draft"]
    for v in figures["variants"]:
        k = v["k"]
        top = None
        # The bandwidth was measured on this host's processor, so it is a ceiling for it alone.
        alone = figures["workload"]["concurrency"] == 1 and base["device"] == "cpu"
        if k is not None and alone and base["weight_bytes"]:
            top = ceiling.shared_device(
                base["weight_bytes"],
                draft["weight_bytes"] if draft else 0,
                figures["memory_read_bytes_per_second"],
                v["mean_accepted_length"] or 1.0,
                k,
            )
        rows.append(
            [
                "auto" if k is None else str(k),
                tables.number(v["tokens_per_second"], 1),
                tables.number(v.get("speedup"), 2, "-"),
                tables.number(v["acceptance_rate"], 2, "-"),
                tables.number(v["mean_accepted_length"], 2, "-"),
                tables.number(v["round_ms"]["draft"]),
                tables.number(v["round_ms"]["verify"]),
                tables.number(v["round_ms"]["overhead"]),
                "-" if top is None else f"{v['tokens_per_second'] / top:.0%}",
                _SAME[v.get("same_tokens_as_base")],
            ]
        )
    peers = figures.get("peers") or []
    for v in peers:
        rows.append(
            [
                v["name"],
                tables.number(v["tokens_per_second"], 1),
                tables.number(v.get("speedup"), 2, "-"),
                *("-" for _ in range(6)),
                _SAME[v.get("same_tokens_as_base")],
            ]
        )
    header = ["K", "tokens/s", "against alone" if peers else "against base"]
    header += ["acceptance", "tokens/round", "draft ms", "verify ms"]
    header += ["overhead ms", "of ceiling", "same tokens"]
    lines = [tables.markdown(header, rows)]
    if peers:
        lines += ["", _verdict(figures)]
    return "\n".join(lines)


def _verdict(figures: dict) -> str:  # type: ignore[type-arg]
    """Whether speculation is worth having: against the best that needs none of it."""
    best = max(figures["variants"], key=lambda v: v["speedup"])
    other = max(figures["peers"], key=lambda v: v["tokens_per_second"])
    name = "auto" if best["k"] is None else f"K = {best['k']}"
    ours = best["tokens_per_second"] / other["tokens_per_second"]
    if ours <= 1.0:
        return f"No speed-up: {other['name']} is faster than {name}, {1 / ours:.2f} times."
    if best["speedup"] <= 1.0:
        return f"No speed-up by speculation; the base alone is {ours:.2f} times {other['name']}."
    return (
        f"{name}: {best['speedup']:.2f} times the faster of the two that run the base alone, "
        f"{ours:.2f} times {other['name']}."
    )


def prompts(count: int, tokens: int | None) -> Sequence[str | Sequence[int]]:
    """Held-out code, or as many random ``tokens`` a prompt."""
    if tokens is not None:
        draw = random.Random(0)
        return [[draw.choice(COMMON_IDS) for _ in range(tokens)] for _ in range(count)]
    texts = [str(entry["text"]) for entry in pair.heldout_prompts()]
    return texts[:: max(1, len(texts) // count)][:count]


def repetitive_prompts(count: int) -> Sequence[str]:
    """Held-out code, each piece three times and the beginning of a fourth."""
    texts = [str(text) for text in prompts(count, None)]
    return [f"{one}\n\n" * 3 + one[: len(one) // 10] for one in texts]


def _ks(text: str) -> list[int | None]:
    ks: list[int | None] = []
    for part in text.split(","):
        if part == "auto":
            ks.append(None)
        elif "-" in part:
            low, high = part.split("-")
            ks.extend(range(int(low), int(high) + 1))
        else:
            ks.append(int(part))
    return ks
