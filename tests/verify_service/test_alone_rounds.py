"""Rounds without a draft that the device takes by itself, with the device played by the host."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from outrider.protos import speculation_pb2 as pb
from outrider.shared.config.schema import ModelConfig
from outrider.shared.core.links import MESSAGES
from outrider.shared.core.rules import COUPLED
from outrider.shared.core.types import Decoding, OpenSequence, VerifyItem
from outrider.shared.model.cuda.runner import CudaRunner
from outrider.shared.model.cuda.turns import turns
from outrider.shared.model.loading import make_runner
from outrider.shared.rounds import grant_loop
from outrider.shared.rounds.grants import Control
from outrider.verify_service import cuda_turns
from outrider.verify_service.alone_rounds import prepare, trial
from outrider.verify_service.cuda_turns import AloneVerifyTurns
from outrider.verify_service.engine import VerifyEngine
from outrider.verify_service.service import SIDE
from outrider_testing import engines, host_device

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9], [3, 2], [3, 8, 4], [6], [2, 6, 4],
           [3, 3, 8, 3], [2, 7, 9], [5, 0, 2, 8], [8, 4, 1]]  # fmt: skip
DRAWN = Decoding(temperature=0.8, seed=7, rule=COUPLED)


@pytest.fixture(scope="module")
def runner() -> Iterator[Any]:
    config = ModelConfig(
        path="tiny", device="cpu", arena_bytes=1 << 20, max_sequences=16, runner="llama"
    )
    made = host_device.hosted(make_runner(engines.tiny_llama(1), config), 4)
    yield made
    made.stop()


class Stream:
    """One coordinator's stream to the verifier: its sequences, and grants over them."""

    def __init__(self, engine: Any, prompts: list[list[int]], decoding: Decoding) -> None:
        """``engine``: or a runner, for an engine of its own."""
        if not isinstance(engine, VerifyEngine):
            engine = VerifyEngine(engine, 4)
        self.session = engine.connect()
        self.session.alone = AloneVerifyTurns.of(engine.runner)
        self.logs, self.decoding = [list(prompt) for prompt in prompts], decoding
        for i, log in enumerate(self.logs):
            self.session.open(OpenSequence(i, 1, len(log) + 40, decoding))
        self.held = [0] * len(prompts)
        self.reasons: list[int] = []
        self.rounds = 0

    def grant(
        self, *, rounds: int = 99, limits: int = 30, stops: tuple[int, ...] = (), revoke: int = -1
    ) -> None:
        """``revoke``: after how many rounds the coordinator does."""
        grant = pb.Grant(id=1, rounds=rounds, patience_seconds=1.0, link=MESSAGES)
        message = pb.VerifyRequest(round=1, grant=grant)
        for i, log in enumerate(self.logs):
            message.grant.sequences.add(k=0, limit=len(log) + limits, stop_token_ids=stops)
            message.items.add(
                sequence_id=i, epoch=1, base_len=self.held[i], append=log[self.held[i] :]
            )
        control = Control(message.grant)
        for answer in grant_loop.run(SIDE, self.session, message, None, control, lambda *_: None):
            self.rounds += 1
            for verdict in answer.verdicts:
                self.held[verdict.sequence_id] = len(self.logs[verdict.sequence_id])
                self.logs[verdict.sequence_id].append(verdict.next_token)
            if self.rounds == revoke:
                control.hear(None)
            if answer.HasField("grant_end"):
                self.reasons.append(answer.grant_end.reason)


def plain(runner: Any, prompts: list[list[int]], count: int, decoding: Decoding) -> list[list[int]]:
    """What the host writes, one sequence at a time."""
    found = []
    for prompt in prompts:
        session, log, held = VerifyEngine(runner, 4).connect(), list(prompt), 0
        session.open(OpenSequence(1, 1, len(prompt) + count + 8, decoding))
        for _ in range(count):
            (verdict,) = session.round([VerifyItem(1, 1, held, tuple(log[held:]))]).answers
            held = len(log)
            log.append(verdict.next_token)
        session.release()
        found.append(log)
    return found


def test_prepare_rehearses_the_turns_that_are_likely_to_come(
    runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is launched that was not captured, when sequences come and go."""
    monkeypatch.setattr(turns, "SLOTS", (1, 2, 4))
    monkeypatch.setattr(cuda_turns, "SLOTS", (1, 2, 4))
    keys: list[Any] = []
    run = host_device.HostStream.run

    def seen(self: Any, key: Any, chain: Any) -> None:
        keys.append(key)
        run(self, key, chain)

    monkeypatch.setattr(host_device.HostStream, "run", seen)
    engine = VerifyEngine(runner, 4)
    session = engine.connect()
    prepare(session)
    assert session.alone.sizes_ahead() == [(1, 0), (2, 0), (4, 0)]
    rehearsed = {key for key in keys if keys.count(key) > 1}  # the second time it is captured
    keys.clear()
    for count in (3, 2, 1, 4):
        stream = Stream(engine, PROMPTS[:count], Decoding())
        stream.session.alone = session.alone
        stream.grant(rounds=3)
        assert taken_by_device(stream)
        assert stream.logs == plain(runner, PROMPTS[:count], 3, Decoding())
        stream.session.release()
    assert keys and set(keys) <= rehearsed


def test_trial_takes_a_turn_of_the_device_and_changes_nothing(runner: Any) -> None:
    engine = VerifyEngine(runner, 4)
    stream = Stream(engine, PROMPTS[:3], Decoding())
    stream.session.alone = None
    behind = [
        VerifyItem(i, 1, 0, tuple(log[:-1]), extend_only=True) for i, log in enumerate(stream.logs)
    ]
    stream.session.round(behind)
    items = [VerifyItem(i, 1, len(log) - 1, (log[-1],)) for i, log in enumerate(stream.logs)]
    for _ in range(3):
        seconds = trial(stream.session, items)
        assert seconds is not None and seconds > 0
    assert taken_by_device(stream)
    stream.held = [len(log) - 1 for log in stream.logs]
    stream.grant(rounds=6)
    assert stream.logs == plain(runner, PROMPTS[:3], 6, Decoding())
    stream.session.release()


@pytest.mark.parametrize("proposal", [(), (1, 2)])
def test_trial_alone_is_for_rounds_without_a_proposal(
    runner: Any, proposal: tuple[int, ...]
) -> None:
    engine = VerifyEngine(runner, 4)
    stream = Stream(engine, [[3, 1]], Decoding())
    stream.session.round([VerifyItem(0, 1, 0, (3,), extend_only=True)])
    found = engine.trial_alone(stream.session, [VerifyItem(0, 1, 1, (1,), proposal)])
    assert (found is None) == bool(proposal)
    stream.session.release()


def taken_by_device(stream: Stream) -> bool:
    alone = stream.session.alone
    return alone is not None and alone.turn >= 0


@pytest.mark.parametrize("decoding", [Decoding(), DRAWN], ids=["greedy", "coupled"])
@pytest.mark.parametrize("count", [1, 3, 11])
def test_alone_turns_write_what_the_host_writes(
    runner: Any, count: int, decoding: Decoding
) -> None:
    stream = Stream(runner, PROMPTS[:count], decoding)
    stream.grant(rounds=6)
    stream.grant(rounds=6)
    assert taken_by_device(stream)
    assert stream.reasons == [pb.GRANT_END_REASON_CREDITS] * 2
    assert stream.logs == plain(runner, PROMPTS[:count], 12, decoding)
    stream.session.release()
    assert runner.arena.used == 0


def test_alone_turns_end_at_a_stop_a_limit_or_the_coordinators_word(runner: Any) -> None:
    expected = plain(runner, PROMPTS[:2], 20, Decoding())
    stop = expected[1][len(PROMPTS[1]) + 4]
    first = min(
        log.index(stop, len(prompt)) - len(prompt)
        for log, prompt in zip(expected, PROMPTS, strict=False)
        if stop in log[len(prompt) :]
    )
    for asked, reason, rounds in (
        ({"stops": (stop,)}, pb.GRANT_END_REASON_STOPPED, first + 1),
        ({"limits": 7}, pb.GRANT_END_REASON_STOPPED, 7),
        ({"revoke": 5}, pb.GRANT_END_REASON_REVOKED, 7),
    ):
        stream = Stream(runner, PROMPTS[:2], Decoding())
        stream.grant(**asked)  # type: ignore[arg-type]
        assert taken_by_device(stream)
        assert (stream.reasons, stream.rounds) == ([reason], rounds)
        for log, whole in zip(stream.logs, expected, strict=True):
            assert log == whole[: len(log)]
        stream.session.release()


@pytest.mark.parametrize(("count", "ahead"), [(3, 2), (11, 1)], ids=["few", "many"])
def test_alone_turns_go_on_while_the_host_keeps_the_books(
    runner: Any, count: int, ahead: int
) -> None:
    """Of few sequences two turns are under way, the first turn being number 0."""
    stream = Stream(runner, PROMPTS[:count], Decoding())
    settle, queued = stream.session.settle, []

    def looking(*rest: Any) -> Any:
        queued.append(stream.session.alone.turn)
        return settle(*rest)

    stream.session.settle = looking  # type: ignore[method-assign]
    stream.grant(limits=5)
    assert queued == [min(turn + ahead, 4) for turn in range(5)]
    assert stream.rounds == 5
    stream.session.release()


def test_alone_turns_leave_the_engine_to_others_between_them(
    runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two coordinators at once: each gets its tokens, and none waits for the other's end."""
    model_stream = host_device.HostStream()  # what both queue runs in one order
    monkeypatch.setattr(
        runner, "turns", lambda kind, mailbox: CudaRunner.turns(runner, kind, mailbox, model_stream)
    )
    engine = VerifyEngine(runner, 4)
    streams = [Stream(engine, prompts, Decoding()) for prompts in (PROMPTS[:2], PROMPTS[2:5])]
    for stream in streams:
        stream.grant(rounds=1)  # takes the prompts in
    threads = [threading.Thread(target=stream.grant, kwargs={"rounds": 19}) for stream in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    model_stream.stop()
    assert streams[0].logs == plain(runner, PROMPTS[:2], 20, Decoding())
    assert streams[1].logs == plain(runner, PROMPTS[2:5], 20, Decoding())
    for stream in streams:
        stream.session.release()


def test_alone_turns_are_the_hosts_where_tokens_are_not_chosen_by_noise_alone(runner: Any) -> None:
    stream = Stream(runner, PROMPTS[:2], Decoding(temperature=0.8, top_k=5, seed=7, rule=COUPLED))
    stream.grant(rounds=4)
    assert not taken_by_device(stream)
    assert stream.logs == plain(runner, PROMPTS[:2], 4, stream.decoding)
    stream.session.release()
