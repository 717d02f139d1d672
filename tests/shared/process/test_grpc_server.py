"""Servers, through real gRPC: a sync and an asyncio one behind the same tests."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from outrider.protos import speculation_pb2 as pb
from outrider.protos import speculation_pb2_grpc as stubs
from outrider.shared.config.schema import ServeConfig
from outrider.shared.core.errors import (
    CapacityError,
    ConfigError,
    InvalidRequest,
    OutriderError,
    ProtocolError,
    ServiceUnavailable,
)
from outrider.shared.process.grpc_server import (
    AioServer,
    Server,
    authorization,
    channel_credentials,
)
from outrider.shared.process.grpc_status import DETAILS_KEY, MAX_MESSAGE
from outrider_testing.waiting import soon

NAME = "outrider.v1.Draft"
LIMIT = 60.0
"""Seconds that anything may take on a busy machine."""


class Probe:
    """What the test's servicers do: raise ``error``, or answer, holding while told to."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.entered = threading.Event()
        self.hold = threading.Event()
        self.hold.set()


class SyncServicer(stubs.DraftServicer):
    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    def Info(self, request: Any, context: Any) -> Any:
        self.probe.entered.set()
        self.probe.hold.wait(LIMIT)
        if self.probe.error is not None:
            raise self.probe.error
        return pb.ServiceInfoResponse(version="test")

    def Rounds(self, request_iterator: Iterator[Any], context: Any) -> Iterator[Any]:
        for message in request_iterator:
            self.probe.hold.wait(LIMIT)
            if self.probe.error is not None:
                raise self.probe.error
            yield pb.DraftResponse(round=message.round)


class AioServicer(stubs.DraftServicer):
    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    async def Info(self, request: Any, context: Any) -> Any:
        self.probe.entered.set()
        await asyncio.to_thread(self.probe.hold.wait, LIMIT)
        if self.probe.error is not None:
            raise self.probe.error
        return pb.ServiceInfoResponse(version="test")

    async def Rounds(self, request_iterator: Any, context: Any) -> Any:
        async for message in request_iterator:
            await asyncio.to_thread(self.probe.hold.wait, LIMIT)
            if self.probe.error is not None:
                raise self.probe.error
            yield pb.DraftResponse(round=message.round)


class Running:
    """A server of either kind; ``drain`` blocks in both."""

    def __init__(self, kind: str, config: ServeConfig, probe: Probe, serving: bool = True) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        if kind == "sync":
            self.server: Any = Server(config, self._add(SyncServicer(probe)), [NAME])
            if serving:
                self.server.serving()
        else:
            self.loop = asyncio.new_event_loop()
            threading.Thread(target=self.loop.run_forever, daemon=True).start()
            try:
                self.server = self._await(self._make(config, probe, serving))
            except BaseException:
                self._end_loop()
                raise
        self.target = str(self.server.address)

    @staticmethod
    def _add(servicer: Any) -> Callable[[Any], None]:
        return lambda server: stubs.add_DraftServicer_to_server(servicer, server)

    async def _make(self, config: ServeConfig, probe: Probe, serving: bool) -> AioServer:
        server = AioServer(config, self._add(AioServicer(probe)), [NAME])
        await server.start()
        if serving:
            await server.serving()
        return server

    def _await(self, coroutine: Any) -> Any:
        assert self.loop is not None
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(LIMIT)

    def _end_loop(self) -> None:
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self.loop.stop)
        while self.loop.is_running():
            time.sleep(0.001)
        self.loop.close()

    def drain(self, grace: float = 0.0) -> None:
        if self.loop is None:
            self.server.drain(grace=grace)
        elif not self.loop.is_closed():
            self._await(self.server.drain(grace))
            self._end_loop()


@pytest.fixture(params=["sync", "aio"])
def run(request: pytest.FixtureRequest, short_folder: Path) -> Iterator[Callable[..., Running]]:
    """``run(**config)``: a running server of one kind, with ``run.probe``."""
    made: list[Running] = []
    probe = Probe()

    def start(serving: bool = True, **config: Any) -> Running:
        config = {"listen": f"unix:{short_folder}/s", "drain_seconds": 0.0} | config
        one = Running(request.param, ServeConfig(**config), probe, serving)
        made.append(one)
        return one

    start.probe = probe  # type: ignore[attr-defined]
    yield start
    probe.hold.set()
    for one in made:
        one.drain()


def info(channel: grpc.Channel, **options: Any) -> Any:
    return stubs.DraftStub(channel).Info(pb.ServiceInfoRequest(), timeout=LIMIT, **options)


def details(error: grpc.RpcError) -> status_pb2.Status:
    trailer = dict(error.trailing_metadata())
    return status_pb2.Status.FromString(trailer[DETAILS_KEY])


def unpack(status: status_pb2.Status, kind: Any) -> Any:
    for detail in status.details:
        message = kind()
        if detail.Unpack(message):
            return message
    return None


def test_rpc_health_follows_loading_and_serving(run: Any) -> None:
    with grpc.insecure_channel(run(serving=False).target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", NAME):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=LIMIT)
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING


def test_rpc_health_says_serving(run: Any) -> None:
    with grpc.insecure_channel(run(listen="127.0.0.1:0").target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", NAME):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=LIMIT)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=NAME), timeout=LIMIT)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


@pytest.mark.parametrize("enabled", [True, False])
def test_rpc_reflection_lists_the_services(run: Any, enabled: bool) -> None:
    with grpc.insecure_channel(run(reflection=enabled).target) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=LIMIT
        )
        if not enabled:
            with pytest.raises(grpc.RpcError, match="UNIMPLEMENTED"):
                next(call)
            return
        names = {one.name for one in next(call).list_services_response.service}
        assert {NAME, "grpc.health.v1.Health"} <= names


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (InvalidRequest("sampling.top_p", 2.0, "in (0, 1]"), "INVALID_ARGUMENT", "INVALID_REQUEST"),
        (CapacityError("the arena is full"), "RESOURCE_EXHAUSTED", "CAPACITY_ERROR"),
        (ConfigError("no model"), "FAILED_PRECONDITION", "CONFIG_ERROR"),
        (ServiceUnavailable("away"), "UNAVAILABLE", "SERVICE_UNAVAILABLE"),
        (ProtocolError("what?"), "FAILED_PRECONDITION", "PROTOCOL_ERROR"),
        (OutriderError("odd"), "INTERNAL", "OUTRIDER_ERROR"),
    ],
)
def test_rpc_errors_become_status_with_details(
    run: Any, error: OutriderError, code: str, reason: str
) -> None:
    server = run()
    run.probe.error = error
    with grpc.insecure_channel(server.target) as channel:
        for call in (
            lambda: info(channel),
            lambda: next(stubs.DraftStub(channel).Rounds(iter([pb.DraftRequest()]), timeout=LIMIT)),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code().name == code
            assert caught.value.details() == str(error)
            status = details(caught.value)
            assert status.message == str(error)
            assert status.code == caught.value.code().value[0]
            assert unpack(status, error_details_pb2.ErrorInfo).reason == reason
            waiting_helps = code in ("UNAVAILABLE", "RESOURCE_EXHAUSTED")
            assert (unpack(status, error_details_pb2.RetryInfo) is not None) == waiting_helps
        run.probe.error = None
        assert info(channel).version == "test", "the server goes on"


def test_rpc_invalid_fields_are_named_in_a_bad_request(run: Any) -> None:
    server = run()
    run.probe.error = InvalidRequest("sampling.top_p", 2.0, "in (0, 1]")
    with grpc.insecure_channel(server.target) as channel, pytest.raises(grpc.RpcError) as caught:
        info(channel)
    (violation,) = unpack(details(caught.value), error_details_pb2.BadRequest).field_violations
    assert (violation.field, violation.description) == ("sampling.top_p", "must be in (0, 1]")


def test_rpc_permanent_lack_of_room_is_told_apart(run: Any) -> None:
    server = run()
    run.probe.error = CapacityError("larger than the arena", permanent=True)
    with grpc.insecure_channel(server.target) as channel, pytest.raises(grpc.RpcError) as caught:
        info(channel)
    status = details(caught.value)
    assert unpack(status, error_details_pb2.ErrorInfo).metadata["permanent"] == "true"
    assert unpack(status, error_details_pb2.RetryInfo) is None


def test_rpc_long_and_odd_messages_fit_into_headers(run: Any) -> None:
    server = run()
    run.probe.error = ConfigError("naïve\n\x00 ✓ " * 2000)
    with grpc.insecure_channel(server.target) as channel, pytest.raises(grpc.RpcError) as caught:
        info(channel)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert len(caught.value.details()) == MAX_MESSAGE
    assert caught.value.details().startswith("naïve   ✓ ")


def test_rpc_unexpected_errors_stay_in_the_log(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    server = run()
    run.probe.error = ZeroDivisionError("a secret of the implementation")
    with (
        caplog.at_level(logging.ERROR, "outrider"),
        grpc.insecure_channel(server.target) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        info(channel)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(caught.value.details())
    number = caught.value.details().split()[2].rstrip(";")
    (record,) = [one for one in caplog.records if number in one.getMessage()]
    assert record.exc_info is not None and record.exc_info[0] is ZeroDivisionError


def test_rpc_port_in_use_is_a_clear_error(run: Any) -> None:
    target = run(listen="127.0.0.1:0").target
    with pytest.raises(ConfigError, match=f"{target}: the port is in use"):
        run(listen=target)
    with grpc.insecure_channel(target) as channel:
        assert info(channel).version == "test"


def test_rpc_second_server_on_one_socket_is_a_clear_error(run: Any) -> None:
    target = run().target
    with pytest.raises(ConfigError, match="another server is listening there"):
        run()
    with grpc.insecure_channel(target) as channel:
        assert info(channel).version == "test", "the first one goes on"


def test_rpc_sockets_are_private_and_go_away(run: Any, short_folder: Path) -> None:
    server = run()
    assert (short_folder / "s").stat().st_mode & 0o777 == 0o600
    server.drain()
    assert list(short_folder.iterdir()) == []


def test_rpc_drain_lets_running_calls_end_and_refuses_new_ones(run: Any) -> None:
    server = run(listen="127.0.0.1:0")
    run.probe.hold.clear()
    with grpc.insecure_channel(server.target) as channel:
        running = stubs.DraftStub(channel).Info.future(pb.ServiceInfoRequest(), timeout=LIMIT)
        assert run.probe.entered.wait(LIMIT)
        draining = threading.Thread(target=server.drain, args=(2 * LIMIT,))
        draining.start()

        def refused() -> bool:
            with (
                grpc.insecure_channel(server.target) as other,
                pytest.raises(grpc.RpcError) as caught,
            ):
                stubs.DraftStub(other).Info(pb.ServiceInfoRequest(), timeout=1)
            return caught.value.code() is grpc.StatusCode.UNAVAILABLE

        soon(refused)
        assert draining.is_alive() and not running.done()
        run.probe.hold.set()
        assert running.result(LIMIT).version == "test"
        draining.join(LIMIT)
        assert not draining.is_alive()


def test_rpc_drain_cancels_what_outlasts_its_grace(run: Any) -> None:
    server = run(listen="127.0.0.1:0")
    with grpc.insecure_channel(server.target) as channel:
        stop = threading.Event()

        def requests() -> Iterator[Any]:
            yield pb.DraftRequest(round=1)
            stop.wait(LIMIT)

        call = stubs.DraftStub(channel).Rounds(requests(), timeout=LIMIT)
        assert next(call).round == 1
        before = time.monotonic()
        server.drain(0.3)
        assert 0.2 < time.monotonic() - before < LIMIT / 2
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        stop.set()
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def test_rpc_token_is_required_where_set(run: Any) -> None:
    server = run(token="sesame")
    with grpc.insecure_channel(server.target) as channel:
        for metadata in ((), (("authorization", "Bearer open"),), (("authorization", "sesame"),)):
            with pytest.raises(grpc.RpcError) as caught:
                info(channel, metadata=metadata)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            with pytest.raises(grpc.RpcError) as caught:
                next(
                    stubs.DraftStub(channel).Rounds(
                        iter([pb.DraftRequest()]), metadata=metadata, timeout=LIMIT
                    )
                )
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert info(channel, metadata=authorization("sesame")).version == "test"
        health = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=LIMIT
        )
        assert health.status == health_pb2.HealthCheckResponse.SERVING


def test_rpc_mutual_tls_admits_only_known_clients(run: Any, tmp_path: Path) -> None:
    make_certificates(tmp_path)
    files = {name: str(tmp_path / name) for name in ("ca.pem", "server.pem", "server.key")}
    server = run(
        listen="localhost:0",
        tls_certificate=files["server.pem"],
        tls_key=files["server.key"],
        tls_client_ca=files["ca.pem"],
    )
    known = channel_credentials(
        files["ca.pem"], str(tmp_path / "client.pem"), str(tmp_path / "client.key")
    )
    assert known is not None
    with grpc.secure_channel(server.target, known) as channel:
        assert info(channel).version == "test"
    unknown = channel_credentials(files["ca.pem"])
    assert unknown is not None
    with grpc.secure_channel(server.target, unknown) as channel, pytest.raises(grpc.RpcError):
        stubs.DraftStub(channel).Info(pb.ServiceInfoRequest(), timeout=LIMIT)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"tls_certificate": "/no/such.pem"}, "must be set together"),
        ({"tls_client_ca": "/no/such.pem"}, "tls_certificate and tls_key must be too"),
        (
            {"tls_certificate": "/no/such.pem", "tls_key": "/no/such.key"},
            "tls_key = '/no/such.key': can't be read",
        ),
    ],
)
def test_rpc_half_configured_tls_is_refused(run: Any, config: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run(**config)


def test_rpc_larger_messages_than_allowed_are_refused(run: Any) -> None:
    server = run(max_message_bytes=1 << 16)
    big = pb.DraftRequest(traceparent="x" * (1 << 17))
    with grpc.insecure_channel(server.target) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            next(stubs.DraftStub(channel).Rounds(iter([big]), timeout=LIMIT))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert info(channel).version == "test"


def make_certificates(folder: Path) -> None:
    """A CA with a server and a client certificate."""
    import subprocess

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    openssl("req", "-x509", *key, "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.pem")
    for name in ("server", "client"):
        (folder / "ext").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        openssl("req", *key[:5], "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", "csr")
        openssl(
            *("x509", "-req", "-in", "csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-days", "2"),
            *("-CAcreateserial", "-extfile", "ext", "-out", f"{name}.pem"),
        )
