"""Three real processes of tiny models, and a collector that keeps what they send."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as trace_grpc

from outrider.coordinator.local import children
from outrider.protos import generation_pb2 as pb
from outrider.protos import generation_pb2_grpc as stubs
from outrider.shared.config.schema import (
    Config,
    CoordinatorConfig,
    DraftConfig,
    TelemetryConfig,
    VerifyConfig,
)
from outrider_testing.waiting import soon

START_SECONDS = 200.0
SERVICES = {"outrider-coordinator", "outrider-draft", "outrider-verify"}


@dataclasses.dataclass(frozen=True)
class Span:
    """One span as the collector got it."""

    service: str
    instance: str
    name: str
    trace: str
    id: str
    parent: str
    start: int
    end: int
    attributes: dict[str, Any]
    events: tuple[tuple[str, dict[str, Any]], ...]
    links: tuple[tuple[str, str], ...]

    @property
    def seconds(self) -> float:
        return (self.end - self.start) / 1e9


def plain(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return tuple(plain(one) for one in value.array_value.values)
    return getattr(value, kind)


def keyed(attributes: Any) -> dict[str, Any]:
    return {one.key: plain(one.value) for one in attributes}


class Collector(trace_grpc.TraceServiceServicer):
    """OTLP's trace service, in memory."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            about = keyed(resource.resource.attributes)
            for scope in resource.scope_spans:
                for one in scope.spans:
                    self.spans.append(self._span(about, one))
        return trace_pb.ExportTraceServiceResponse()

    @staticmethod
    def _span(about: dict[str, Any], one: Any) -> Span:
        return Span(
            about["service.name"],
            about["service.instance.id"],
            one.name,
            one.trace_id.hex(),
            one.span_id.hex(),
            one.parent_span_id.hex(),
            one.start_time_unix_nano,
            one.end_time_unix_nano,
            keyed(one.attributes),
            tuple((event.name, keyed(event.attributes)) for event in one.events),
            tuple((link.trace_id.hex(), link.span_id.hex()) for link in one.links),
        )

    def of(self, trace_id: str) -> list[Span]:
        """The spans of a trace that have come so far."""
        return [one for one in self.spans if one.trace == trace_id]


class Cluster:
    """Coordinator, draft and verifier as processes; any of them can be killed and started."""

    def __init__(
        self, config: Config, events: queue.SimpleQueue[Any], collector: Collector
    ) -> None:
        self.config = config
        self._collector = collector
        self._events = events
        self._children: dict[str, Any] = {}
        self._lines: dict[str, list[str]] = {}

    @property
    def target(self) -> str:
        return self.config.coordinator.listen

    def start(self, *names: str) -> None:
        """Starts parts and waits until they are ready."""
        for name in names:
            self._children[name] = children.start(name, self.config, self._events)
        until = time.monotonic() + START_SECONDS
        while not all(self._children[name].ready for name in names):
            event = self._events.get(timeout=max(0.1, until - time.monotonic()))
            self._note(event)
            started = [self._children[name] for name in names]
            assert event.kind not in ("ended", "failed") or event.child not in started, event

    def kill(self, name: str) -> None:
        """Kills a part as the system would."""
        os.kill(self._children[name].process.pid, signal.SIGKILL)
        self._children[name].process.wait()
        self._children[name].process.stdin.close()

    @contextlib.contextmanager
    def paused(self, name: str) -> Iterator[None]:
        """Halts a part for the length of the block."""
        os.kill(self._children[name].process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._children[name].process.pid, signal.SIGCONT)

    def log(self, name: str) -> list[str]:
        """The log lines of a part so far."""
        while not self._events.empty():
            self._note(self._events.get())
        return self._lines.get(name, [])

    def _note(self, event: Any) -> None:
        if event.kind == "line":
            self._lines.setdefault(event.child.name, []).append(event.text)

    def trace(self, trace_id: str) -> list[Span]:
        """The spans of a trace whose request is over, all that will ever come.

        Each part sends its spans in order: when those of a later request have come from all
        parts, there is nothing before them that is still on its way.
        """
        marker = ""

        def drafted() -> bool:
            nonlocal marker
            marker = secrets.token_hex(16)
            metadata = [("traceparent", f"00-{marker}-{secrets.token_hex(8)}-01")]
            return bool(self.generate(metadata=metadata)[1].speculation.proposed)

        def told() -> bool:
            found = self._collector.of(marker)
            return {one.service for one in found} == SERVICES and any(
                one.name.startswith("text_completion") for one in found
            )

        soon(drafted)
        soon(told)
        return self._collector.of(trace_id)

    def stop(self) -> None:
        """Ends all parts."""
        children.stop_in_order(list(self._children.values()), 20.0)

    def generate(
        self,
        prompt: str = "def add(left, right):",
        *,
        k: int | None = 3,
        tokens: int = 24,
        drawn: bool = False,
        metadata: Sequence[tuple[str, str]] = (),
        seen: Callable[[pb.GenerateResponse], None] = lambda response: None,
    ) -> tuple[list[int], pb.Finished, str]:
        """Token ids, the last message and the request id.

        ``drawn``: by `rejection` at temperature 1 and not greedily; with a fixed K no round runs
        without the draft then, however late it is.
        """
        rule = pb.ACCEPTANCE_RULE_REJECTION if drawn else pb.ACCEPTANCE_RULE_UNSPECIFIED
        request = pb.GenerateRequest(
            prompt=prompt,
            stopping=pb.StopConditions(max_new_tokens=tokens, ignore_eos=True),
            speculation=pb.SpeculationParameters(k=k, rule=rule),
            sampling=pb.SamplingParameters(seed=1, temperature=float(drawn)),
        )
        ids: list[int] = []
        with grpc.insecure_channel(self.target) as channel:
            call = stubs.GenerationStub(channel).Generate(
                request, metadata=tuple(metadata), timeout=240
            )
            for response in call:
                seen(response)
                kind = response.WhichOneof("event")
                if kind == "started":
                    name = response.started.request_id
                elif kind == "delta":
                    ids += response.delta.token_ids
                else:
                    finished = response.finished
        return ids, finished, name


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="session")
def collector() -> Iterator[tuple[str, Collector]]:
    """A collector and its endpoint."""
    made = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    trace_grpc.add_TraceServiceServicer_to_server(made, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"http://127.0.0.1:{port}", made
    server.stop(None).wait()


@pytest.fixture(scope="session")
def cluster(tiny_base: Path, collector: tuple[str, Collector]) -> Iterator[Cluster]:
    """All three parts, traced and metered; the draft is the base, so it is often right."""
    folder = Path(tempfile.mkdtemp(prefix="or-", dir="/tmp"))
    model = {
        "path": str(tiny_base), "device": "cpu", "threads": 1, "arena_bytes": 32 << 20,
        "calibrate": False,
    }  # fmt: skip
    config = Config(
        base=VerifyConfig(listen=f"unix:{folder}/base", **model),
        draft=DraftConfig(listen=f"unix:{folder}/draft", **model),
        coordinator=CoordinatorConfig(
            listen=f"unix:{folder}/coordinator",
            base_target=f"unix:{folder}/base",
            draft_target=f"unix:{folder}/draft",
            tokenizer=str(tiny_base),
            prefill_chunk=8,
            verify_patience_seconds=START_SECONDS,
        ),
        telemetry=TelemetryConfig(
            traces="otlp-grpc",
            endpoint=collector[0],
            log_format="json",
            prometheus_coordinator=free_port(),
            prometheus_base=free_port(),
            prometheus_draft=free_port(),
            profile=True,
        ),
    )
    made = Cluster(config, queue.SimpleQueue(), collector[1])
    try:
        made.start("base", "draft", "coordinator")
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)
