"""What a service program decides by itself, and what it does before it serves."""

from __future__ import annotations

import dataclasses
import json
import logging
import queue
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from outrider.coordinator.local import children
from outrider.protos import speculation_pb2 as pb
from outrider.protos import speculation_pb2_grpc as stubs
from outrider.shared.config.schema import VerifyConfig, load
from outrider.shared.rounds import program
from outrider.shared.rounds.program import spin_seconds

START_SECONDS = 120


@pytest.mark.parametrize(
    ("busy", "cores", "watches"),
    [(2, 2, False), (1, 2, False), (4, 4, False), (4, 6, True), (8, 64, True), (0, 1, False),
     (0, 2, True)],
)  # fmt: skip
def test_services_watch_for_each_other_only_with_cores_to_spare(
    busy: int, cores: int, watches: bool
) -> None:
    assert (spin_seconds(busy, cores) > 0) is watches


def started(folder: Path, **changes: Any) -> tuple[list[str], pb.ServiceInfoResponse]:
    """What a verify service said while it started, and what it says of itself then."""
    config = load(None, environment={})
    base = dataclasses.replace(config.base, listen=f"unix:{folder}/base", device="cpu", **changes)
    events: queue.SimpleQueue[children.Event] = queue.SimpleQueue()
    child = children.start("base", dataclasses.replace(config, base=base), events)
    said: list[str] = []
    try:
        while not said or said[-1] != "ready":
            event = events.get(timeout=START_SECONDS)
            assert event.kind not in ("ended", "failed"), event.text
            if event.kind != "line":
                said.append(event.text if event.kind == "progress" else event.kind)
        with grpc.insecure_channel(base.listen) as channel:
            return said, stubs.VerifyStub(channel).Info(pb.ServiceInfoRequest(), timeout=60)
    finally:
        children.stop([child], 10)
        child.let_go()


def test_service_times_its_rounds_before_it_is_ready_and_only_once(
    tiny_base: Path, short_folder: Path
) -> None:
    settings = {"path": str(tiny_base), "cache_dir": str(short_folder / "kept"), "max_k": 2}
    said, info = started(short_folder, **settings)
    assert said[-2:] == ["calibrating", "ready"]
    assert (info.costs[0].sequences, info.costs[0].amount) == (1, 1)
    assert all(0 < one.seconds < START_SECONDS and one.amount <= 3 for one in info.costs)
    assert (info.sequences, info.model.arena_tokens_used) == (0, 0)
    # As if no round had been disturbed, which would be timed anew: see ``kept_costs``.
    (kept,) = (short_folder / "kept").glob("costs-*.json")
    table = json.loads(kept.read_text())
    table["found"] = [[count, amount, 1e-6] for count, amount, _ in table["found"]]
    kept.write_text(json.dumps(table))
    said, again = started(short_folder, **settings)
    assert said[-1] == "ready" and "calibrating" not in said
    assert [one.seconds for one in again.costs] == [1e-6] * len(info.costs)
    _, untimed = started(short_folder, **settings, calibrate=False)
    assert not untimed.costs


def test_service_starts_where_its_rounds_can_not_be_timed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken: Any = SimpleNamespace(trial_amounts=(1, 5))  # and nothing else
    config = VerifyConfig(cache_dir=str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert program._costs(config, broken, lambda text: None) == ()
    assert "rounds could not be timed" in caplog.text
    assert not list(tmp_path.iterdir())
