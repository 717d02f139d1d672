"""Turns out of spans, and what they say of who waits."""

from __future__ import annotations

import json
from typing import Any

import pytest

from outrider.coordinator.bench.studies import timeline

MS = 1_000_000


def span(name: str, begin: int, end: int, trace: str = "a") -> dict[str, Any]:
    return {
        "traceId": trace, "spanId": "1", "name": name,
        "startTimeUnixNano": str(begin * MS), "endTimeUnixNano": str(end * MS),
    }  # fmt: skip


def lines(*groups: list[dict[str, Any]]) -> str:
    return "".join(
        json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": group}]}]}) + "\n"
        for group in groups
    )


def test_turns_are_the_services_spans_in_any_order() -> None:
    text = lines(
        [span("verify", 5, 9), span("round", 0, 9)],
        [span("draft", 1, 4), span("catch_up", 0, 1), span("draft", 9, 11, "b")],
    )
    found = sorted((s["trace"], s["service"], s["begin"], s["end"]) for s in timeline.turns(text))
    assert found == [
        ("a", "draft", 1 * MS, 4 * MS), ("a", "verify", 5 * MS, 9 * MS),
        ("b", "draft", 9 * MS, 11 * MS),
    ]  # fmt: skip
    assert list(timeline.turns(lines())) == []


def test_window_is_whole_rounds_from_the_midst() -> None:
    # Ten rounds of 10 ms, the draft's 3 of them and the base's 5; before them the base alone.
    spans = [span("verify", 0, 4)]
    for number in range(1, 11):
        spans += [span("draft", 10 * number, 10 * number + 3)]
        spans += [span("verify", 10 * number + 4, 10 * number + 9)]
    shown = timeline.window(list(timeline.turns(lines(spans[::-1]))), 4)
    assert [(one["service"], one["begin"], one["end"]) for one in shown] == [
        turn
        for number in range(4)
        for turn in (
            ("draft", 10.0 * number, 10.0 * number + 3),
            ("verify", 10.0 * number + 4, 10.0 * number + 9),
        )
    ]
    parts = timeline.shares(shown)
    # 39 ms from the first turn's begin to the last one's end.
    assert parts == pytest.approx({"draft": 12 / 39, "verify": 20 / 39, "neither": 7 / 39})


def test_shares_count_time_in_which_both_work_once() -> None:
    shown = [
        {"service": "draft", "begin": 0.0, "end": 6.0},
        {"service": "verify", "begin": 4.0, "end": 8.0},
        {"service": "draft", "begin": 5.0, "end": 7.0},
        {"service": "verify", "begin": 9.0, "end": 10.0},
    ]
    parts = timeline.shares(shown)
    assert parts == pytest.approx({"draft": 0.8, "verify": 0.5, "neither": 0.1})


def test_window_wants_more_rounds_than_it_shows() -> None:
    spans = list(timeline.turns(lines([span("draft", n, n + 1) for n in range(3)])))
    with pytest.raises(timeline.NoRounds, match="rounds: got 3; the request had 3"):
        timeline.window(spans, 3)
