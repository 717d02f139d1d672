"""The figures as tables, at most 100 columns wide, and what is to be said of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outrider.coordinator.bench import tables
from outrider.coordinator.bench.serve.traffic import Load

NAMES = {
    "ttft": "first token",
    "tpot": "token after it",
    "itl": "between messages",
    "e2e": "whole answer",
}
LATE = 0.01
"""Seconds by which the client may be late at its 99th percentile before it is said."""


def text(figures: Mapping[str, Any]) -> str:
    """Both tables, then failures and warnings, a line each."""
    lines = [rates(figures), "", times(figures)]
    notes = [note for level in figures["levels"] for note in _notes(level)]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def rates(figures: Mapping[str, Any]) -> str:
    """Counts and throughput of each level."""
    rows = [
        [
            _name(level),
            tables.number(level["completed"], 0),
            tables.number(level["failed"], 0),
            tables.number(level["requests_per_second"], 2),
            tables.number(level["goodput_per_second"], 2, "-"),
            tables.number(level["output_tokens_per_second"], 1),
            tables.number(level["total_tokens_per_second"], 1, "-"),
            tables.number(level["mean_in_flight"], 1),
        ]
        for level in figures["levels"]
    ]
    header = ["load", "done", "failed", "requests/s", "goodput/s", "tokens/s", "all tokens/s"]
    return tables.markdown([*header, "in flight"], rows)


def times(figures: Mapping[str, Any]) -> str:
    """Times of each level's completed requests, in milliseconds."""
    columns = ("mean", "p50", "p90", "p99", "max")
    rows = [
        [_name(level), said, *(tables.number(1e3 * level[name][c], 1) for c in columns)]
        for level in figures["levels"]
        for name, said in NAMES.items()
        if level[name] is not None
    ]
    return tables.markdown(["load", "time, ms", *columns], rows)


def _name(level: Mapping[str, Any]) -> str:
    return str(Load(**level["load"]))


def _notes(level: Mapping[str, Any]) -> list[str]:
    name = _name(level)
    made = [
        f"{name}: {count} failed, {reason}: {level['failure_messages'][reason]}"
        for reason, count in level["failures"].items()
    ]
    if level["unfinished"]:
        made.append(f"{name}: interrupted with {level['unfinished']} requests under way")
    if level["completed"] and not level["tokens_counted_by_server"]:
        made.append(f"{name}: the server counts no tokens; each message was taken for one")
    late = {
        "sent requests": level["send_late"],
        "woke up": level["client_lag"],
    }
    made += [
        f"{name}: this client {what} up to {1e3 * how['p99']:.0f} ms late (99th percentile), "
        "which its times include"
        for what, how in late.items()
        if how is not None and how["p99"] > LATE
    ]
    return made
