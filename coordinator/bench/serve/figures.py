"""Figures of a level out of what became of its requests. Seconds and tokens, nothing rounded."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from outrider.coordinator.bench.serve.answer import Answer
from outrider.coordinator.bench.serve.drive import LevelRun
from outrider.coordinator.bench.serve.traffic import Load
from outrider.coordinator.telemetry.percentile import percentile

TIMES = ("ttft", "tpot", "itl", "e2e")
"""Time to first token, per token after it, between two messages, and to the end."""


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Count, mean, percentiles and the highest; None for no value."""
    ordered = sorted(values)
    if not ordered:
        return None
    return {
        "count": len(ordered),
        "mean": math.fsum(ordered) / len(ordered),
        "p50": percentile(ordered, 0.5),
        "p90": percentile(ordered, 0.9),
        "p99": percentile(ordered, 0.99),
        "max": ordered[-1],
    }


def summary(load: Load, run: LevelRun, limits: Mapping[str, float]) -> dict[str, Any]:
    """One level's figures. ``limits``: seconds by name of ``TIMES``, for goodput.

    Rates are over the time from the level's begin to its last answer.
    """
    done = [one for one in run.answers if one.completed]
    failed = [one for one in run.answers if one.failure is not None]
    seconds = max((one.ended for one in run.answers if one.ended is not None), default=run.end)
    seconds -= run.begin
    prompts = [one.prompt_tokens for one in done]
    output = sum(one.tokens for one in done)
    known = None if None in prompts else sum(count or 0 for count in prompts)
    good = sum(is_good(one, limits) for one in done)
    rounds, proposed = sum(one.rounds for one in done), sum(one.proposed for one in done)
    return {
        "load": {"rate": load.rate, "concurrency": load.concurrency},
        "completed": len(done),
        "failed": len(failed),
        "unfinished": len(run.answers) - len(done) - len(failed),
        "failures": dict(Counter(one.failure for one in failed).most_common()),
        "failure_messages": {one.failure: one.failure_message for one in reversed(failed)},
        "seconds": seconds,
        "requests_per_second": len(done) / seconds,
        "goodput_per_second": good / seconds if limits else None,
        "prompt_tokens": known,
        "output_tokens": output,
        "output_tokens_per_second": output / seconds,
        "total_tokens_per_second": None if known is None else (known + output) / seconds,
        "tokens_counted_by_server": all(one.output_tokens is not None for one in done),
        "mean_in_flight": math.fsum(one.e2e for one in done + failed) / seconds,
        "ttft": spread(one.ttft for one in done if one.ttft is not None),
        "tpot": spread(one.tpot for one in done if one.tpot is not None),
        "itl": spread(gap for one in done for gap in one.gaps),
        "e2e": spread(one.e2e for one in done),
        "send_late": spread(one.sent - one.due for one in run.answers if one.due is not None),
        "client_lag": spread(run.lags),
        "acceptance_rate": sum(one.accepted for one in done) / proposed if proposed else None,
        "mean_accepted_length": output / rounds if rounds else None,
    }


def is_good(answer: Answer, limits: Mapping[str, float]) -> bool:
    """Whether a completed request kept every limit; of ``itl``, its longest gap did.

    A time that it does not have, such as that of a second token, breaks no limit.
    """
    times = {
        "ttft": answer.ttft,
        "tpot": answer.tpot,
        "itl": max(answer.gaps, default=None),
        "e2e": answer.e2e,
    }
    return all((value := times[name]) is None or value <= most for name, most in limits.items())


def read_limits(text: str) -> dict[str, float]:
    """Reads limits in seconds, as ``ttft=0.2,tpot=0.05``, for ``argparse``'s ``type``."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if name not in TIMES or name in limits or not 0 < seconds < math.inf:
            raise argparse.ArgumentTypeError(
                f"got {part!r}; must be NAME=SECONDS, each of {', '.join(TIMES)} at most once"
            )
        limits[name] = seconds
    return limits
