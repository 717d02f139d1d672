"""The services through real gRPC, over real engines of tiny models."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc
import pytest

from outrider.draft_service.engine import DraftEngine
from outrider.draft_service.service import make_servicer as make_draft
from outrider.protos import speculation_pb2 as pb
from outrider.protos import speculation_pb2_grpc as stubs
from outrider.shared.config.schema import ModelConfig, ServeConfig
from outrider.shared.core import wire
from outrider.shared.core.errors import RefusalCode
from outrider.shared.core.model_facts import read_description
from outrider.shared.core.types import Decoding, OpenSequence, ProposeItem, VerifyItem
from outrider.shared.model.loading import load_runner
from outrider.shared.process.grpc_server import Server
from outrider.shared.rounds.servicer import add_to_server
from outrider.verify_service.engine import VerifyEngine
from outrider.verify_service.service import make_servicer as make_verify
from outrider_testing.waiting import soon


def request(role: str, number: int, items: Any = (), open: Any = (), **parts: Any) -> Any:
    """A message to draft or verifier, from the plain types."""
    kind: Any = pb.DraftRequest if role == "draft" else pb.VerifyRequest
    return kind(
        round=number,
        items=[asdict(item) for item in items],
        open=[wire.write_open(one) for one in open],
        **parts,
    )


class Stream:
    """One coordinator connection."""

    def __init__(self, channel: grpc.Channel, role: str) -> None:
        self._role = role
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        stub = stubs.DraftStub(channel) if role == "draft" else stubs.VerifyStub(channel)
        self.call = stub.Rounds(iter(self._requests.get, None), timeout=60)
        self._number = 0

    def ask(self, items: Any = (), **parts: Any) -> Any:
        self._number += 1
        self._requests.put(request(self._role, self._number, items, **parts))
        response = next(self.call)
        assert response.round == self._number
        return response

    def half_close(self) -> None:
        self._requests.put(None)


class Service:
    """A running service with its engine at hand."""

    def __init__(self, role: str, path: Path, folder: Path) -> None:
        self.role = role
        config = ModelConfig(path=str(path), device="cpu", arena_bytes=1 << 22, max_k=8)
        runner = load_runner(config)
        self.engine: Any = (DraftEngine if role == "draft" else VerifyEngine)(runner, config.max_k)
        self.servicer = make_draft() if role == "draft" else make_verify()
        self.server = Server(
            ServeConfig(listen=f"unix:{folder}/{role}"),
            lambda server: add_to_server(server, self.servicer, role.capitalize()),
            [f"outrider.v1.{role.capitalize()}"],
        )
        self.channel = grpc.insecure_channel(str(self.server.address))

    def stream(self) -> Stream:
        return Stream(self.channel, self.role)

    def info(self) -> Any:
        stub = (stubs.DraftStub if self.role == "draft" else stubs.VerifyStub)(self.channel)
        return stub.Info(pb.ServiceInfoRequest(), timeout=60)

    def settled(self) -> Any:
        """Info once no stream is open."""
        return soon(lambda: None if (info := self.info()).streams else info)


@pytest.fixture
def service(short_folder: Path, tiny_base: Path, tiny_draft: Path) -> Iterator[Callable[..., Any]]:
    made: list[Service] = []

    def start(role: str, attach: bool = True) -> Service:
        one = Service(role, tiny_draft if role == "draft" else tiny_base, short_folder)
        if attach:
            one.servicer.attach(one.engine)
        made.append(one)
        return one

    yield start
    for one in made:
        one.channel.close()
        one.server.drain(grace=0)


def opened(sequence_id: int, capacity: int = 64, epoch: int = 1) -> OpenSequence:
    return OpenSequence(sequence_id, epoch, capacity, Decoding(prompt_len=3))


ITEMS = {
    "draft": lambda sequence_id: ProposeItem(sequence_id, 1, 0, (5, 6, 7), 4),
    "verify": lambda sequence_id: VerifyItem(sequence_id, 1, 0, (5, 6, 7), (8, 9)),
}
both = pytest.mark.parametrize("role", ["draft", "verify"])


def test_rounds_a_draft_that_is_the_base_is_accepted_whole(
    short_folder: Path, tiny_base: Path
) -> None:
    draft, verify = (Service(role, tiny_base, short_folder) for role in ("draft", "verify"))
    draft.servicer.attach(draft.engine)
    verify.servicer.attach(verify.engine)
    drafts, verifies = draft.stream(), verify.stream()
    drafts.ask(open=[opened(1)])
    verifies.ask(open=[opened(1)])
    log, draft_has, base_has = [5, 6, 7], 0, 0
    for _ in range(6):
        n = len(log)
        (proposal,) = drafts.ask(
            [ProposeItem(1, 1, draft_has, tuple(log[draft_has:]), 4)]
        ).proposals
        assert proposal.committed_len == n and len(proposal.tokens) == 4
        (verdict,) = verifies.ask(
            [VerifyItem(1, 1, base_has, tuple(log[base_has:]), tuple(proposal.tokens))]
        ).verdicts
        assert (verdict.num_accepted, verdict.committed_len) == (4, n + 5)
        log += [*proposal.tokens, verdict.next_token]
        base_has, draft_has = n + 4, n + 3
    for one, stream in ((draft, drafts), (verify, verifies)):
        stream.ask(goodbye=True)
        assert list(stream.call) == []
        one.channel.close()
        one.server.drain(grace=0)


@both
def test_rounds_timing_is_filled(service: Any, role: str) -> None:
    stream = service(role).stream()
    timing = stream.ask([ITEMS[role](1)], open=[opened(1)]).timing
    assert 0 < timing.model_seconds <= timing.service_seconds < 60
    assert timing.rows == {"draft": 6, "verify": 5}[role]
    stream.ask(goodbye=True)


@both
def test_rounds_info_describes_model_and_arena(service: Any, role: str) -> None:
    one = service(role)
    stream = one.stream()
    stream.ask(open=[opened(1, capacity=100)])
    info = one.info()
    assert info.protocol == wire.PROTOCOL
    model = info.model
    assert read_description(model) == one.engine.runner.facts
    assert (model.architecture, model.runner) == ("LlamaForCausalLM", "cpu")
    assert (model.vocab_size, len(model.vocab_fingerprint)) == (320, 64)
    assert (info.sequences, info.streams, info.max_k) == (1, 1, 8)
    assert 100 <= model.arena_tokens_used < model.arena_tokens
    assert model.parameters * 4 == model.weight_bytes
    assert list(model.eos_token_ids) == [0]
    assert info.resident_bytes > 1 << 20
    stream.ask(goodbye=True)


@both
def test_rounds_goodbye_frees_without_a_word(
    service: Any, role: str, caplog: pytest.LogCaptureFixture
) -> None:
    one = service(role)
    with caplog.at_level(logging.WARNING, "outrider"):
        stream = one.stream()
        stream.ask([ITEMS[role](1)], open=[opened(1)])
        stream.ask(goodbye=True)
        assert list(stream.call) == [], "the service ends the stream after its answer"
        assert stream.call.code() is grpc.StatusCode.OK
        assert one.settled().model.arena_tokens_used == 0
    assert not [r for r in caplog.records if "goodbye" in r.getMessage()]


@both
@pytest.mark.parametrize("how", ["cancel", "half close", "channel"])
def test_rounds_an_end_without_goodbye_frees_and_is_logged(
    service: Any, role: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    one = service(role)
    with caplog.at_level(logging.WARNING, "outrider"):
        channel = grpc.insecure_channel(str(one.server.address))
        stream = Stream(channel, role)
        stream.ask([ITEMS[role](1)], open=[opened(1), opened(2)])
        assert one.info().sequences == 2
        if how == "cancel":
            stream.call.cancel()
        elif how == "half close":
            stream.half_close()
        else:
            channel.close()
        info = one.settled()
        assert (info.sequences, info.model.arena_tokens_used, info.streams) == (0, 0, 0)
        channel.close()
    assert any("ended without goodbye" in r.getMessage() for r in caplog.records)


@both
def test_rounds_streams_own_their_sequences(service: Any, role: str) -> None:
    one = service(role)
    first, second = one.stream(), one.stream()
    first.ask(open=[opened(1)])
    second.ask(open=[opened(1)])
    assert one.info().sequences == 2
    first.ask(goodbye=True)
    answer = second.ask([ITEMS[role](1)])
    assert not answer.errors
    second.ask(goodbye=True)
    assert one.settled().sequences == 0


@both
def test_rounds_close_is_looked_at_before_open_before_items(service: Any, role: str) -> None:
    one = service(role)
    stream = one.stream()
    total = one.info().model.arena_tokens
    assert not stream.ask(open=[opened(1, capacity=total - 80)]).errors
    answer = stream.ask([ITEMS[role](2)], close=[1], open=[opened(2, capacity=total - 80)])
    assert not answer.errors
    stream.ask(goodbye=True)


@both
def test_rounds_refusals_name_the_sequence_and_leave_the_others(service: Any, role: str) -> None:
    one = service(role)
    stream = one.stream()
    huge = opened(3, capacity=2**31)
    answer = stream.ask([ITEMS[role](9), ITEMS[role](1)], open=[opened(1), huge])
    assert [(e.sequence_id, e.code) for e in answer.errors] == [
        (3, RefusalCode.NO_CAPACITY),
        (9, RefusalCode.UNKNOWN),
    ]
    assert all(e.message for e in answer.errors)
    answers = answer.proposals if role == "draft" else answer.verdicts
    assert [a.sequence_id for a in answers] == [1]
    stream.ask(goodbye=True)


@both
def test_rounds_an_unknown_rule_is_refused(service: Any, role: str) -> None:
    stream = service(role).stream()
    message = request(role, 1, open=[opened(1)])
    message.open[0].decoding.rule = 0
    stream._requests.put(message)
    (error,) = next(stream.call).errors
    assert error.code == RefusalCode.INVALID and "decoding.rule" in error.message
    stream.half_close()


@both
def test_rounds_are_unavailable_while_loading(service: Any, role: str) -> None:
    one = service(role, attach=False)
    with pytest.raises(grpc.RpcError) as caught:
        one.stream().ask()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == "the model is still loading"
    with pytest.raises(grpc.RpcError, match="still loading"):
        one.info()
    one.servicer.attach(one.engine)
    assert one.info().model.vocab_size == 320


@both
def test_rounds_draining_admits_nothing_and_serves_the_rest(service: Any, role: str) -> None:
    one = service(role)
    stream = one.stream()
    stream.ask(open=[opened(1)])
    one.servicer.drain()
    assert not one.servicer.idle()
    answer = stream.ask([ITEMS[role](1)], open=[opened(2)])
    assert [(e.sequence_id, e.code) for e in answer.errors] == [(2, RefusalCode.NO_CAPACITY)]
    assert len(answer.proposals if role == "draft" else answer.verdicts) == 1
    stream.ask(close=[1])
    assert one.servicer.idle()
    stream.ask(goodbye=True)


@both
def test_rounds_many_streams_leave_nothing_behind(service: Any, role: str) -> None:
    one = service(role)
    for number in range(60):
        stream = one.stream()
        stream.ask([ITEMS[role](number)], open=[opened(number)])
        if number % 2:
            stream.ask(goodbye=True)
        else:
            stream.call.cancel()
    info = one.settled()
    assert (info.sequences, info.model.arena_tokens_used, info.streams) == (0, 0, 0)
    assert info.arena_tokens_largest_free == info.model.arena_tokens
