"""A model service as a process: start, signals, supervisor."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from outrider.protos import speculation_pb2 as pb
from outrider.protos import speculation_pb2_grpc as stubs
from outrider.shared.core import wire
from outrider.shared.core.types import Decoding, OpenSequence

DRAFT = "outrider.draft_service"
Spawn = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def started(spawn: Spawn, short_folder: Path, tiny_draft: Path) -> Callable[..., Any]:
    """``started(*flags)``: a draft service that is ready, and its reports."""

    def start(*flags: str, **options: Any) -> tuple[Any, str]:
        target = f"unix:{short_folder}/d"
        read, write = os.pipe()
        process = spawn(
            *(DRAFT, "--path", str(tiny_draft), "--device", "cpu", "--listen", target),
            *("--arena-bytes", "4MiB", "--status-fd", str(write), *flags),
            pass_fds=(write,),
            stderr=subprocess.DEVNULL,
            **options,
        )
        os.close(write)
        with os.fdopen(read) as reports:
            events = []
            for line in reports:
                events.append(json.loads(line))
                if events[-1]["event"] == "ready":
                    break
        assert events[-1] == {"event": "ready", "address": target}
        assert any(one["event"] == "progress" for one in events)
        return process, target

    return start


def opened(key: int) -> pb.OpenSequence:
    return wire.write_open(OpenSequence(key, 1, 64, Decoding()))


def one_sequence(channel: grpc.Channel) -> tuple[Any, Any]:
    """A stream that holds one sequence, and where its requests go."""
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    call = stubs.DraftStub(channel).Rounds(iter(requests.get, None), timeout=200)
    requests.put(pb.DraftRequest(round=1, open=[opened(1)]))
    assert next(call).round == 1
    return call, requests


def test_model_service_sigterm_drains(started: Any, short_folder: Path) -> None:
    process, target = started("--drain-seconds", "300")
    with grpc.insecure_channel(target) as channel:
        call, requests = one_sequence(channel)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        process.send_signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        item = pb.ProposeItem(sequence_id=1, epoch=1, append=(5, 6), k=2)
        requests.put(pb.DraftRequest(round=2, items=[item], open=[opened(2)]))
        answer = next(call)
        assert len(answer.proposals[0].tokens) == 2, "the running stream goes on"
        assert "shutting down" in answer.errors[0].message
        assert process.poll() is None
        requests.put(pb.DraftRequest(round=3, close=[1]))
        assert process.wait(60) == 0, "it ends as soon as nothing lives"
    assert list(short_folder.iterdir()) == []


def test_model_service_second_signal_ends_at_once(started: Any) -> None:
    process, target = started("--drain-seconds", "300")
    with grpc.insecure_channel(target) as channel:
        call, _ = one_sequence(channel)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        process.send_signal(signal.SIGINT)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        with pytest.raises(grpc.RpcError):
            next(call)


def test_model_service_drain_is_limited(started: Any) -> None:
    process, target = started("--drain-seconds", "0.5")
    with grpc.insecure_channel(target) as channel:
        one_sequence(channel)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_model_service_ends_with_its_supervisor(started: Any, short_folder: Path) -> None:
    process, _ = started("--watch-stdin", stdin=subprocess.PIPE)
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(60) == 0
    assert list(short_folder.iterdir()) == []


def test_model_service_sigterm_while_loading(spawn: Spawn, tiny_draft: Path) -> None:
    process = spawn(DRAFT, "--path", str(tiny_draft), "--listen", "127.0.0.1:0")
    assert process.stderr is not None
    process.stderr.readline()  # "loading …": the signal handlers are in place
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0
    assert "Traceback" not in errors


def test_model_service_port_in_use_is_told_before_loading(spawn: Spawn) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        target = f"127.0.0.1:{other.getsockname()[1]}"
        process = spawn(DRAFT, "--path", "/no/such/model", "--listen", target)
        _, errors = process.communicate(timeout=200)
    assert process.returncode == 1
    assert f"{target}: the port is in use" in errors


@pytest.mark.parametrize("path", ["/no/such/model", "/tmp", "../nowhere/at/all"])
def test_model_service_without_a_model_says_what_is_expected(spawn: Spawn, path: str) -> None:
    process = spawn(DRAFT, "--path", path, "--listen", "127.0.0.1:0", "--device", "cpu")
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 1
    assert path in errors and "config.json" in errors
    assert "Traceback" not in errors
