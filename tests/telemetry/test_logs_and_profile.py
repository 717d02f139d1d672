"""The request log of a running coordinator, and the profile of a request."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from outrider.coordinator.profile import chrome_trace, file
from outrider.coordinator.profile.collector import Collector
from outrider.coordinator.profile.file import PHASES
from outrider.coordinator.profile.html import rounds_of_tokens
from outrider.protos import generation_pb2 as pb
from outrider.protos import generation_pb2_grpc as stubs


@pytest.fixture(scope="module")
def profiled(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The record of one request, its file, and what the client was told."""
    path: Path = tmp_path_factory.mktemp("profile") / "out.json"
    collector = Collector(path, "def add(")
    ids, finished, _ = cluster.generate("def add(", tokens=40, k=4, seen=collector.see)
    with grpc.insecure_channel(cluster.target) as channel:
        collector.write(channel)
    return file.read(path), path, ids, finished


def test_request_is_one_json_line_with_its_trace(cluster: Any) -> None:
    trace = secrets.token_hex(16)
    metadata = [("traceparent", f"00-{trace}-{secrets.token_hex(8)}-00")]
    ids, finished, request_id = cluster.generate(tokens=8, metadata=metadata)
    with grpc.insecure_channel(cluster.target) as channel:  # its log comes before this answer
        stubs.GenerationStub(channel).Profile(pb.ProfileRequest(request_id=request_id))
    lines = [json.loads(line) for line in cluster.log("coordinator")]
    (line,) = [one for one in lines if one.get("request_id") == request_id]
    assert line["trace_id"] == trace
    assert line["level"] == "info" and line["logger"] == "outrider.request"
    assert line["completion_tokens"] == len(ids)
    assert line["accepted"] == finished.speculation.accepted
    assert line["reason"] == "max_tokens"


def test_profile_agrees_with_what_the_client_was_told(profiled: Any) -> None:
    record, _, ids, finished = profiled
    assert record["request"]["token_ids"] == ids
    speculation, told = record["speculation"], finished.speculation
    assert speculation["rounds"] == told.rounds
    assert speculation["proposed_by_position"] == list(told.proposed_by_position)
    assert speculation["accepted_by_position"] == list(told.accepted_by_position)
    assert speculation["acceptance_rate"] == pytest.approx(told.acceptance_rate)
    assert speculation["mean_accepted_length"] == pytest.approx(told.mean_accepted_length)
    assert record["seconds"]["total"] == pytest.approx(told.seconds.total)
    assert record["seconds"]["queue"] == pytest.approx(told.seconds.queue)
    assert sum(one["emitted"] for one in record["rounds"]) == len(ids)
    assert rounds_of_tokens(record)[-1] == len(record["rounds"]) - 1


def test_profile_phases_add_up(profiled: Any) -> None:
    record, *_ = profiled
    for one in record["rounds"]:
        total = sum(one["phases"][name] for name in PHASES if name != "idle")
        assert total - one["hidden"] == pytest.approx(one["seconds"], rel=0.02)


def test_profile_statistics_are_numpys(profiled: Any) -> None:
    record, *_ = profiled
    for name in PHASES:
        values = [one["phases"][name] for one in record["rounds"]]
        figures = record["phases"][name]
        assert figures["total"] == pytest.approx(np.sum(values))
        assert figures["median"] == pytest.approx(np.median(values))
        assert figures["p90"] == pytest.approx(np.percentile(values, 90))
        assert figures["p99"] == pytest.approx(np.percentile(values, 99))


def test_profile_tells_memory_and_ceiling(profiled: Any) -> None:
    record, *_ = profiled
    assert set(record["memory"]) == {"coordinator", "base", "draft"}
    assert all(one["resident_bytes"] > 10**6 for one in record["memory"].values())
    assert record["memory"]["base"]["arena_tokens"] > 0
    ceiling = record["ceiling"]
    assert ceiling["share"] == pytest.approx(
        ceiling["measured_tokens_per_second"] / ceiling["tokens_per_second"]
    )


def test_profile_as_chrome_trace(profiled: Any) -> None:
    record, *_ = profiled
    events = json.loads(json.dumps(chrome_trace.trace(record)))["traceEvents"]
    slices = [one for one in events if one["ph"] == "X"]
    rounds = [one for one in slices if one["name"].startswith("round ")]
    assert len(rounds) == len(record["rounds"])
    assert {one["pid"] for one in slices} == {
        chrome_trace.COORDINATOR,
        chrome_trace.DRAFT,
        chrome_trace.VERIFY,
    }
    assert all(one["dur"] >= 0 for one in slices)
    # A model's own time lies within its service's, and that within its round.
    for side in ("draft", "verify"):
        outer = {one["ts"]: one["dur"] for one in slices if one["name"] == side}
        for one in slices:
            if one["name"] == f"{side} model":
                assert one["dur"] <= outer[one["ts"]] + 1e-3
    for one in slices:
        assert any(
            each["ts"] - 1 <= one["ts"] and one["ts"] + one["dur"] <= each["ts"] + each["dur"] + 1
            for each in rounds
        )


def test_profile_of_an_unknown_request_is_refused(cluster: Any) -> None:
    with (
        grpc.insecure_channel(cluster.target) as channel,
        pytest.raises(grpc.RpcError) as refused,
    ):
        stubs.GenerationStub(channel).Profile(pb.ProfileRequest(request_id="nobody"))
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not json", "not JSON"),
        ("{}", "not a profile"),
        ('{"format": "outrider-profile", "version": 99}', "version 99"),
    ],
)
def test_files_that_are_no_profiles_are_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(file.ConfigError, match=words):
        file.read(path)


def test_summary_names_every_phase(profiled: Any) -> None:
    text = file.summary(profiled[0])
    for name in PHASES:
        assert f"\n{name} " in text
