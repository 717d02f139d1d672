"""Log lines as text and as JSON."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from outrider.shared.process import logs
from outrider.shared.telemetry.spans import TraceContext

CONTEXT = TraceContext(0xABC, 0xDEF, True)


@pytest.fixture
def root() -> Iterator[None]:
    """Puts the root logger back as it was."""
    logger = logging.getLogger()
    before = logger.handlers[:], logger.level
    yield
    logger.handlers[:], level = before
    logger.setLevel(level)


def lines(form: str, level: str = "info") -> list[str]:
    stream = io.StringIO()
    logs.set_up(level, form, stream)
    log = logging.getLogger("outrider.x")
    log.debug("not shown at info")
    log.info("request %s", "done", extra=logs.fields(CONTEXT, tokens=3, name='two "words"'))
    log.warning("plain")
    try:
        raise ValueError("boom")
    except ValueError:
        log.exception("went wrong")
    return stream.getvalue().splitlines()


@pytest.mark.usefixtures("root")
def test_json_lines_carry_trace_and_fields() -> None:
    made = [json.loads(line) for line in lines("json")]
    assert [one["message"] for one in made] == ["request done", "plain", "went wrong"]
    first = made[0]
    assert first["trace_id"] == f"{0xABC:032x}" and first["span_id"] == f"{0xDEF:016x}"
    assert (first["tokens"], first["name"]) == (3, 'two "words"')
    assert (first["level"], first["logger"]) == ("info", "outrider.x")
    assert "ValueError: boom" in made[2]["exception"]


@pytest.mark.usefixtures("root")
def test_text_lines_end_in_fields() -> None:
    made = lines("text")
    assert made[0].endswith(
        f"INFO outrider.x: request done trace_id={0xABC:032x} span_id={0xDEF:016x} "
        'tokens=3 name="two \\"words\\""'
    )
    assert made[1].endswith("WARNING outrider.x: plain")


@pytest.mark.usefixtures("root")
def test_level_is_kept() -> None:
    assert len([line for line in lines("json", "warning") if line]) == 2
