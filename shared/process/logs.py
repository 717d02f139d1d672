"""Log lines: for a person as text, for a machine as one JSON object each, with trace ids.

A line carries structure where its call site passes ``extra=fields(...)``; in text form the
fields follow the message as ``key=value``.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outrider.shared.telemetry.spans import TraceContext

_ATTRIBUTE = "outrider_fields"


def fields(context: TraceContext | None = None, /, **values: Any) -> dict[str, Any]:
    """The ``extra`` argument of a log call; ``context`` adds ``trace_id`` and ``span_id``."""
    made: dict[str, Any] = {}
    if context is not None:
        made["trace_id"] = context.trace_hex
        made["span_id"] = f"{context.span_id:016x}"
    return {_ATTRIBUTE: {**made, **values}}


def set_up(level: str, form: str, stream: IO[str] | None = None) -> None:
    """Sends all log lines to ``stream`` (standard error); ``form`` is "text" or "json"."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class TextFormatter(logging.Formatter):
    """``2026-01-01 12:00:00,000 INFO outrider.x: message key=value``"""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The line, with its fields at the end of the message."""
        line = super().format(record)
        values = _fields(record)
        if not values:
            return line
        head, newline, rest = line.partition("\n")
        return head + "".join(f" {k}={_text(v)}" for k, v in values.items()) + newline + rest


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time``, ``level``, ``logger``, ``message`` and the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The object as text, without line breaks."""
        made: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            made["exception"] = self.formatException(record.exc_info)
        return json.dumps(made, ensure_ascii=False, default=str)


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    values: Mapping[str, Any] = getattr(record, _ATTRIBUTE, {})
    return values


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or set(text) & set(' "=\n') else text
