"""A profile in the Chrome trace event format, which ui.perfetto.dev and chrome://tracing open.

https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

from typing import Any

COORDINATOR, DRAFT, VERIFY = 1, 2, 3
_NAMES = {COORDINATOR: "coordinator", DRAFT: "draft", VERIFY: "verify"}


def trace(record: dict[str, Any]) -> dict[str, Any]:
    """The trace as a JSON object; one process each for coordinator, draft and verifier."""
    events: list[dict[str, Any]] = []
    for pid, name in _NAMES.items():
        events.append(_meta("process_name", pid, name=name))
        events.append(_meta("process_sort_index", pid, sort_index=pid))
        events.append(_meta("thread_name", pid, name="rounds"))
    for one in record["rounds"]:
        events += _round(one)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"trace_id": record["trace_id"], "link": record["link"]},
    }


def _round(one: dict[str, Any]) -> list[dict[str, Any]]:
    shown = ("k", "proposed", "accepted", "emitted", "rows", "rollback", "batch_size", "lost")
    name = f"round {one['round']} ({one['mode']})"
    at, end = one["at"], one["at"] + one["seconds"]
    made = [_slice(COORDINATOR, name, at, one["seconds"], {key: one[key] for key in shown})]
    if one["phases"]["accept"]:
        made.append(
            _slice(COORDINATOR, "accept", end - one["phases"]["accept"], one["phases"]["accept"])
        )
    for pid, side in ((DRAFT, "draft"), (VERIFY, "verify")):
        exchange = one[side]
        if exchange is None:
            continue
        made.append(
            _slice(
                pid,
                side,
                exchange["served_at"],
                exchange["service_seconds"],
                {"round": one["round"], "rows": exchange["rows"]},
            )
        )
        made.append(_slice(pid, f"{side} model", exchange["served_at"], exchange["model_seconds"]))
    made.append(_count("K", at, {"asked": one["k"], "accepted": one["accepted"]}))
    return made


def _slice(
    pid: int, name: str, at: float, seconds: float, args: dict[str, Any] | None = None
) -> dict[str, Any]:
    # Microseconds, as the format wants.
    return {
        "name": name,
        "cat": _NAMES[pid],
        "ph": "X",
        "ts": round(at * 1e6, 3),
        "dur": round(seconds * 1e6, 3),
        "pid": pid,
        "tid": 1,
        "args": args or {},
    }


def _count(name: str, at: float, values: dict[str, float]) -> dict[str, Any]:
    return {
        "name": name,
        "ph": "C",
        "ts": round(at * 1e6, 3),
        "pid": COORDINATOR,
        "tid": 1,
        "args": values,
    }


def _meta(kind: str, pid: int, **args: Any) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": pid, "tid": 1, "args": args}
