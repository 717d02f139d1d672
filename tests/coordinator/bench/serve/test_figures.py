"""Figures of a level, against numpy and by hand."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.coordinator.bench.serve import figures, report
from outrider.coordinator.bench.serve.answer import Answer
from outrider.coordinator.bench.serve.drive import LevelRun
from outrider.coordinator.bench.serve.traffic import Load
from outrider.coordinator.telemetry.percentile import percentile

SECONDS = st.floats(0, 1e6, allow_nan=False)


@given(st.lists(SECONDS, min_size=1, max_size=40), st.floats(0, 1))
def test_percentiles_are_numpys(values: list[float], share: float) -> None:
    found = percentile(sorted(values), share)
    assert found == pytest.approx(np.percentile(values, 100 * share), rel=1e-9, abs=1e-9)


@given(st.lists(SECONDS, min_size=1, max_size=40))
def test_spread_is_numpys(values: list[float]) -> None:
    found = figures.spread(values)
    wanted = [len(values), np.mean(values), *np.percentile(values, (50, 90, 99)), max(values)]
    assert found is not None and list(found.values()) == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_spread_of_nothing_is_none() -> None:
    assert figures.spread([]) is None


def answered(sent: float, *messages: float, tokens: int | None = None) -> Answer:
    return Answer(
        sent, messages=list(messages), ended=messages[-1], prompt_tokens=10, output_tokens=tokens
    )


@pytest.fixture
def run() -> LevelRun:
    """Three answers, two failures, and one request that was interrupted."""
    failures = [
        Answer(104.0, ended=105.0, failure="HTTP 503", failure_message="busy"),
        Answer(104.0, ended=104.5, failure="timeout", failure_message="late"),
    ]
    return LevelRun(
        begin=100.0,
        end=120.0,
        answers=[
            answered(100.0, 101.0, 102.0, 104.0, tokens=4),
            answered(101.0, 101.5, 101.75, 102.5, tokens=3),
            answered(102.0, 110.0, tokens=1),
            *failures,
            Answer(119.0),
        ],
    )


def test_summary_by_hand(run: LevelRun) -> None:
    found = figures.summary(Load(concurrency=3), run, {})
    assert found["load"] == {"rate": None, "concurrency": 3}
    assert (found["completed"], found["failed"], found["unfinished"]) == (3, 2, 1)
    assert found["failures"] == {"HTTP 503": 1, "timeout": 1}
    assert found["failure_messages"] == {"HTTP 503": "busy", "timeout": "late"}
    assert found["seconds"] == 10.0  # up to the last answer, not to the interruption
    assert found["requests_per_second"] == 0.3
    assert found["output_tokens_per_second"] == 0.8
    assert found["total_tokens_per_second"] == 3.8
    assert found["mean_in_flight"] == pytest.approx((4.0 + 1.5 + 8.0 + 1.0 + 0.5) / 10)
    assert found["goodput_per_second"] is None
    assert found["ttft"]["mean"] == pytest.approx((1.0 + 0.5 + 8.0) / 3)
    # Seconds a token after the first: 3 in 3 s, 2 in 1 s; the answer of one token has none.
    assert found["tpot"]["count"] == 2 and found["tpot"]["mean"] == pytest.approx(0.75)
    assert found["itl"]["count"] == 4 and found["itl"]["max"] == 2.0
    assert found["e2e"]["p50"] == 4.0 and found["e2e"]["max"] == 8.0
    assert found["send_late"] is None and found["acceptance_rate"] is None


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"ttft": 1.0}, 2),
        ({"ttft": 0.9}, 1),
        ({"tpot": 0.5}, 2),  # the answer of one token has no second to be late
        ({"itl": 1.0}, 2),  # the longest gap of the first is 2 s
        ({"e2e": 4.0}, 2),
        ({"e2e": 1.5}, 1),
        ({"ttft": 1.0, "itl": 1.0}, 1),
        ({"ttft": 0.1}, 0),
    ],
)
def test_goodput_counts_answers_that_keep_every_limit(
    run: LevelRun, limits: dict[str, float], good: int
) -> None:
    found = figures.summary(Load(concurrency=3), run, limits)
    assert found["goodput_per_second"] == pytest.approx(good / 10)


def test_summary_without_counts_of_the_server_takes_messages_for_tokens() -> None:
    answer = Answer(0.0, messages=[1.0, 2.0], ended=2.0)
    found = figures.summary(Load(rate=1.0), LevelRun(0.0, 2.0, [answer]), {})
    assert found["output_tokens"] == 2 and not found["tokens_counted_by_server"]
    assert found["total_tokens_per_second"] is None
    assert "each message was taken for one" in report.text({"levels": [found]})


def test_limits_are_read_by_name() -> None:
    assert figures.read_limits("ttft=0.2,itl=0.05") == {"ttft": 0.2, "itl": 0.05}
    for text in ("", "ttft", "ttft=", "ttft=0", "ttft=-1", "ttft=nan", "p99=1", "e2e=1,e2e=2"):
        with pytest.raises(argparse.ArgumentTypeError, match="each of ttft, tpot, itl, e2e"):
            figures.read_limits(text)


def test_report_fits_a_hundred_columns_and_tells_of_failures(run: LevelRun) -> None:
    for answer in run.answers:
        # As late as the default timeout allows.
        answer.messages = [one + 590 for one in answer.messages]
        answer.due, answer.ended = answer.sent - 0.5, answer.ended and answer.ended + 590
    run.lags = [0.2] * 50
    for load in (Load(rate=123.456), Load(concurrency=1000), Load()):
        level = figures.summary(load, run, {"ttft": 1.0})
        level |= {"completed": 123_456, "failed": 12_345, "requests_per_second": 12_345.67}
        level |= {"total_tokens_per_second": 1e6, "output_tokens_per_second": 1e5}
        text = report.text({"levels": [level]})
        tables = [line for line in text.splitlines() if line.startswith("|")]
        assert max(map(len, tables)) <= 100
        assert "1 failed, HTTP 503: busy" in text and "1 failed, timeout: late" in text
        assert "interrupted with 1 requests under way" in text
        assert "sent requests up to 500 ms late" in text and "woke up up to 200 ms late" in text
