"""The line that tells of a running level, for terminals alone."""

from __future__ import annotations

import io

import pytest

from outrider.coordinator.bench.serve import progress
from outrider.coordinator.bench.serve.answer import Answer


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


ANSWERS = [Answer(0.0, ended=1.0), Answer(0.0, ended=1.0, failure="HTTP 503"), Answer(0.5)]


def test_progress_is_one_line_that_changes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    stream = Terminal()
    show = progress.watcher("4 at once", 9, stream)
    show(ANSWERS[:1])
    show(ANSWERS)  # too soon after the last
    now += progress.INTERVAL
    show(ANSWERS)
    progress.clear(stream)
    first, second, last = stream.getvalue().split("\r\x1b[K")[1:]
    assert first == "4 at once: 1 of 9 done, 0 in flight"
    assert second == "4 at once: 2 of 9 done, 1 in flight, 1 failed" and last == ""


def test_progress_writes_nothing_into_a_file() -> None:
    stream = io.StringIO()
    progress.watcher("4 at once", 9, stream)(ANSWERS)
    progress.clear(stream)
    assert stream.getvalue() == ""
