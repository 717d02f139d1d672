"""Turns that the device takes by itself, with the device played by the host."""

from __future__ import annotations

import mmap
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from outrider.draft_service.engine import DraftEngine
from outrider.draft_service.service import SIDE as DRAFT
from outrider.protos import speculation_pb2 as pb
from outrider.shared.config.schema import ModelConfig
from outrider.shared.core.rules import COUPLED, REJECTION
from outrider.shared.core.types import Decoding, OpenSequence, ProposeItem, VerifyItem
from outrider.shared.link.device.mailbox import DeviceLayout, DeviceMailbox, DeviceRegion
from outrider.shared.link.doorbell import Doorbell
from outrider.shared.link.mailbox import Layout, Mailbox
from outrider.shared.model.loading import make_runner
from outrider.shared.rounds import grant_loop
from outrider.shared.rounds.grants import Control
from outrider.verify_service.engine import VerifyEngine
from outrider.verify_service.service import SIDE as VERIFY
from outrider_testing import host_device

VOCAB = 64
PATIENCE = 300.0


def model(seed: int, layers: int, vocabulary: int = VOCAB) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=256,
        initializer_range=0.4,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def runner(seed: int, vocabulary: int = VOCAB) -> Any:
    config = ModelConfig(
        path="tiny",
        device="cpu",
        dtype="bfloat16",
        arena_bytes=1 << 18,
        max_sequences=4,
        runner="llama",
    )
    return host_device.hosted(make_runner(model(seed, 1, vocabulary), config), 4)


class Side:
    """An engine, its session and its end of the mailbox."""

    def __init__(self, engine: Any, bell: Doorbell, mailbox: DeviceMailbox) -> None:
        self.engine, self.session, self.bell = engine, engine.connect(), bell
        bell.device = mailbox


@pytest.fixture(scope="module")
def runners() -> tuple[Any, Any, Any]:
    """The base, a draft with the same weights, and one that knows nothing."""
    return runner(0), runner(0), runner(1)


@pytest.fixture(params=["twin", "stranger"])
def sides(request: Any, runners: Any) -> Iterator[SimpleNamespace]:
    base, twin, stranger = runners
    with paired(base, twin if request.param == "twin" else stranger) as made:
        made.twin = request.param == "twin"
        yield made


@contextmanager
def paired(base: Any, draft: Any) -> Iterator[SimpleNamespace]:
    """Both sides of a mailbox, over these runners."""
    layout, device_layout = Layout(4, 4, 4), DeviceLayout(4, 4)
    memory = mmap.mmap(-1, layout.size)
    regions = [
        DeviceRegion(torch.zeros(device_layout.size, dtype=torch.uint8), device_layout)
        for _ in range(2)
    ]
    ends = socket.socketpair()
    made = []
    for index, (kind, engine) in enumerate(
        (("verify", VerifyEngine(base, 4)), ("draft", DraftEngine(draft, 4)))
    ):
        bell = Doorbell(Mailbox(memory, layout), ends[index], kind)  # type: ignore[arg-type]
        mailbox = DeviceMailbox(regions[index], regions[1 - index], kind)  # type: ignore[arg-type]
        made.append(Side(engine, bell, mailbox))
    yield SimpleNamespace(verify=made[0], draft=made[1])
    for side in made:
        side.bell.close()
        side.session.release()
        side.engine.runner.stop()
        assert side.engine.runner.arena.used == 0
        # Whoever had the engine to himself has let go of it.
        assert side.engine.lock.acquire(blocking=False)
        side.engine.lock.release()


def alone(engine: VerifyEngine, prompt: list[int], count: int, decoding: Decoding) -> list[int]:
    """What the base writes token by token, asked by the host."""
    session = engine.connect()
    session.open(OpenSequence(1, 1, len(prompt) + count + 8, decoding))
    log, held = list(prompt), 0
    for _ in range(count):
        (verdict,) = session.round([VerifyItem(1, 1, held, tuple(log[held:]))]).answers
        held = len(log)
        log.append(verdict.next_token)
    session.release()
    return log


class Grant:
    """A grant over both sides, begun; the prompts are taken in, all but their last token."""

    def __init__(
        self, sides: Any, prompts: list[list[int]], new: int, k: int, decoding: Decoding,
        *, rounds: int = 100, number: int = 1, stops: tuple[int, ...] = (),
        patience: float = PATIENCE, ids: list[int] | None = None, shared: int = 0,
    ) -> None:  # fmt: skip
        """``shared``: so many tokens of all prompts are the same and taken in once."""
        self.sides, self.logs, self.seen = sides, [list(one) for one in prompts], {}
        self.reports: list[pb.VerifyResponse] = []
        self.draft_end: pb.GrantEnd | None = None
        ids = ids or list(range(1, len(prompts) + 1))
        self.index = {i: at for at, i in enumerate(ids)}
        granted = [
            pb.GrantedSequence(k=k, limit=len(one) + new, stop_token_ids=stops) for one in prompts
        ]
        prefix, parent = tuple(prompts[0][:shared]), 60 if shared else None
        for side in (sides.verify, sides.draft):
            if shared:
                side.session.open(OpenSequence(60, 1, shared + 1, decoding))
        if shared:
            taken = sides.verify.session.round([VerifyItem(60, 1, 0, prefix, extend_only=True)])
            assert not taken.refusals
            assert not sides.draft.session.round([ProposeItem(60, 1, 0, prefix, 0)]).refusals
        for side in (sides.verify, sides.draft):
            for i, prompt in zip(ids, prompts, strict=True):
                own = replace(decoding, prompt_len=len(prompt), seed=decoding.seed + i)
                room = len(prompt) + new + 8
                side.session.open(OpenSequence(i, 1, room, own, parent, shared))
        self.heads = [
            VerifyItem(i, 1, shared, tuple(p[shared:-1]), extend_only=True)
            for i, p in zip(ids, prompts, strict=True)
        ]
        assert not sides.verify.session.round(self.heads).refusals
        self.grant = pb.Grant(
            id=number, mailbox=1, rounds=rounds, patience_seconds=patience, sequences=granted,
            link="cuda-ipc",
        )  # fmt: skip
        self.asked = {
            "verify": pb.VerifyRequest(round=7, grant=self.grant),
            "draft": pb.DraftRequest(round=7, grant=self.grant),
        }
        self.asked["draft"].grant.patience_seconds = 3600  # as the coordinator has it
        for i, p in zip(ids, prompts, strict=True):
            self.asked["verify"].items.add(
                sequence_id=i, epoch=1, base_len=len(p) - 1, append=p[-1:]
            )
            # The draft has seen nothing yet.
            self.asked["draft"].items.add(
                sequence_id=i, epoch=1, base_len=shared, append=p[shared:], k=k
            )
        self.controls = {kind: Control(self.grant) for kind in ("verify", "draft")}
        self.after_round: Callable[[int], None] = lambda step: None
        self.threads = [
            threading.Thread(target=self._verify), threading.Thread(target=self._draft)
        ]  # fmt: skip

    def run(self, after_verify: Callable[[], None] = lambda: None) -> Grant:
        """To its end; ``after_verify`` is called when the verifier has left it."""
        for thread in self.threads:
            thread.start()
        for thread, left in zip(self.threads, (after_verify, lambda: None), strict=True):
            thread.join(120)
            assert not thread.is_alive(), "a side did not leave the grant"
            left()
        return self

    @property
    def end(self) -> pb.GrantEnd:
        """The verifier's."""
        return self.reports[-1].grant_end

    def _seen(self, kind: str) -> Callable[..., None]:
        def note(step: int, items: Any, result: Any, began: float, done: float) -> None:
            assert 0 <= done - began < 120
            self.seen.setdefault(kind, []).append((step, len(items), result))

        return note

    def _verify(self) -> None:
        side = self.sides.verify
        for response in grant_loop.run(
            VERIFY, side.session, self.asked["verify"], side.bell, self.controls["verify"],
            self._seen("verify"),
        ):  # fmt: skip
            self.reports.append(response)
            offered = {one.sequence_id: one for one in response.granted.proposals}
            for verdict in response.verdicts:
                proposal = offered[verdict.sequence_id].tokens
                log = self.logs[self.index[verdict.sequence_id]]
                assert offered[verdict.sequence_id].committed_len == len(log)
                log += [*proposal[: verdict.num_accepted], verdict.next_token]
                assert verdict.committed_len == len(log)
            self.after_round(response.granted.step)

    def _draft(self) -> None:
        side = self.sides.draft
        (response,) = grant_loop.run(
            DRAFT, side.session, self.asked["draft"], side.bell, self.controls["draft"],
            self._seen("draft"),
        )  # fmt: skip
        self.draft_end = response.grant_end


DECODINGS = {
    "greedy": Decoding(),
    "coupled": Decoding(temperature=0.9, seed=5, rule=COUPLED),
}
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9]]


@pytest.mark.parametrize("rule", DECODINGS)
@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("count", [1, 3])
def test_turns_write_what_the_base_writes_alone(sides: Any, rule: str, k: int, count: int) -> None:
    decoding = DECODINGS[rule]
    made = Grant(sides, PROMPTS[:count], 24, k, decoding).run()
    assert made.end.reason == pb.GRANT_END_REASON_STOPPED, (made.end, made.draft_end)
    # The grant ends when the first sequence comes to its end; each is a prefix of its own text.
    assert max(len(log) - len(p) for log, p in zip(made.logs, PROMPTS, strict=False)) == 24
    for i, (log, prompt) in enumerate(zip(made.logs, PROMPTS, strict=False)):
        own = replace(decoding, prompt_len=len(prompt), seed=decoding.seed + i + 1)
        expected = alone(sides.verify.engine, prompt, 24, own)
        assert log == expected[: len(log)] and len(log) > len(prompt)
    rounds = made.seen["verify"]
    assert [step for step, _, _ in rounds] == list(range(len(rounds))) and made.end.rounds == len(
        rounds
    )
    assert all(items == count for _, items, _ in rounds)
    accepted = sum(v.num_accepted for r in made.reports for v in r.verdicts)
    proposed = sum(len(p.tokens) for r in made.reports for p in r.granted.proposals)
    if sides.twin:
        assert accepted == proposed  # the draft's KV was right in every turn
    else:
        assert accepted < proposed


def test_turns_go_on_from_a_prefix_that_sequences_share(sides: Any) -> None:
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [3, 1, 4, 1, 5, 3, 5]]
    made = Grant(sides, prompts, 16, 3, Decoding(), shared=5).run()
    assert made.end.reason == pb.GRANT_END_REASON_STOPPED, (made.end, made.draft_end)
    for side in (sides.verify, sides.draft):
        assert side.engine.runner.arena.used < 5 + 1 + sum(len(p) + 24 for p in prompts)
    for log, prompt in zip(made.logs, prompts, strict=True):
        own = replace(Decoding(), prompt_len=len(prompt))
        assert log == alone(sides.verify.engine, prompt, 16, own)[: len(log)]
        assert len(log) > len(prompt)


def goes_on(sides: Any, made: Grant, k: int) -> None:
    """After whatever came before, another grant and the host's own rounds write the right text."""
    prompt = [8, 8, 1]
    again = Grant(sides, [prompt], 12, k, Decoding(seed=40), number=made.grant.id + 1, ids=[9])
    again.run()
    assert again.end.reason == pb.GRANT_END_REASON_STOPPED, (again.end, again.draft_end)
    own = Decoding(seed=49, prompt_len=3)
    assert again.logs[0] == alone(sides.verify.engine, prompt, 12, own)


def check(sides: Any, made: Grant, decoding: Decoding = DECODINGS["greedy"]) -> None:
    """What was reported is the base's own text, and both sides hold what they should."""
    for i, (log, prompt) in enumerate(zip(made.logs, PROMPTS, strict=False)):
        own = replace(decoding, prompt_len=len(prompt), seed=decoding.seed + i + 1)
        assert log == alone(sides.verify.engine, prompt, len(log) - len(prompt), own)
        # The host takes over where the devices stopped, with nothing sent again.
        held = sides.verify.session.held(i + 1)
        assert held.log == log and held.extent.valid_len == len(log) - 1
        item = VerifyItem(i + 1, 1, len(log) - 1, (log[-1],))
        (verdict,) = sides.verify.session.round([item]).answers
        assert [*log, verdict.next_token] == alone(
            sides.verify.engine, prompt, len(log) - len(prompt) + 1, own
        )


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_turns_end_with_the_credits_and_go_on_with_new_ones(sides: Any, rounds: int) -> None:
    made = Grant(sides, PROMPTS[:2], 40, 3, Decoding(), rounds=rounds).run()
    assert made.end.reason == pb.GRANT_END_REASON_CREDITS and made.end.rounds == rounds
    assert made.draft_end is not None and made.draft_end.reason == pb.GRANT_END_REASON_STOPPED
    check(sides, made)
    goes_on(sides, made, 3)


def test_turns_of_the_draft_hold_what_the_coordinator_relies_on(sides: Any) -> None:
    made = Grant(sides, PROMPTS, 40, 3, Decoding(), rounds=4).run()
    for i, log in enumerate(made.logs):
        # As the pointers' contract has it: after accepting `a` of K at n, min(n + a, n + K - 1).
        last = made.reports[-1]
        n, a = last.granted.proposals[i].committed_len, last.verdicts[i].num_accepted
        base_len = min(n + a, n + 2)
        assert sides.draft.session.held(i + 1).extent.valid_len >= base_len
        item = ProposeItem(i + 1, 1, base_len, tuple(log[base_len:]), 4)
        (proposal,) = sides.draft.session.round([item]).answers
        fresh = sides.draft.engine.connect()
        fresh.open(OpenSequence(1, 1, len(log) + 8, sides.draft.session.held(i + 1).decoding))
        (expected,) = fresh.round([ProposeItem(1, 1, 0, tuple(log), 4)]).answers
        fresh.release()
        assert proposal.tokens == expected.tokens


@pytest.mark.parametrize("where", ["verify", "draft"])
def test_turns_end_when_the_coordinator_wants_something_else(sides: Any, where: str) -> None:
    made = Grant(sides, PROMPTS[:2], 60, 2, Decoding())

    def interrupt(step: int) -> None:
        if step == 2:
            made.controls[where].hear(None)

    made.after_round = interrupt
    made.run()
    assert made.end.reason == pb.GRANT_END_REASON_REVOKED
    # The round that ran, and the one that was queued before the word came.
    assert 3 <= made.end.rounds <= 5
    check(sides, made)
    goes_on(sides, made, 2)


def test_turns_end_when_k_changes(sides: Any) -> None:
    made = Grant(sides, PROMPTS[:1], 60, 2, Decoding())
    change = pb.VerifyRequest(change=pb.GrantChange(id=1, rounds=50, ks=[4]))
    made.after_round = lambda step: step == 1 and made.controls["verify"].hear(change)  # type: ignore[assignment,return-value]
    made.run()
    assert made.end.reason == pb.GRANT_END_REASON_REVOKED and made.end.rounds <= 4
    check(sides, made)
    goes_on(sides, made, 4)


def test_turns_take_more_credits_on_the_way(sides: Any) -> None:
    made = Grant(sides, PROMPTS[:1], 60, 2, Decoding(), rounds=3)
    change = pb.VerifyRequest(change=pb.GrantChange(id=1, rounds=4))
    made.after_round = lambda step: step == 0 and made.controls["verify"].hear(change)  # type: ignore[assignment,return-value]
    made.run()
    assert made.end.reason == pb.GRANT_END_REASON_CREDITS and 5 <= made.end.rounds <= 6
    check(sides, made)


def test_turns_end_with_a_stop_token(sides: Any) -> None:
    text = alone(sides.verify.engine, PROMPTS[0], 30, Decoding(prompt_len=5, seed=1))[5:]
    stop = text[9]
    made = Grant(sides, PROMPTS[:1], 30, 3, Decoding(), stops=(stop,)).run()
    assert made.end.reason == pb.GRANT_END_REASON_STOPPED
    new = made.logs[0][5:]
    # The round in which it came is reported whole: what is after it is cut where text is made.
    assert stop in new and new.index(stop) == text.index(stop)
    assert len(new) - new.index(stop) <= 4


def test_turns_with_a_draft_that_stands_still_end_and_leave_both_able_to_go_on(sides: Any) -> None:
    made = Grant(sides, PROMPTS[:1], 60, 2, Decoding(), patience=1.0)
    gate = threading.Event()
    stream = None

    def stall(step: int) -> None:
        nonlocal stream
        if step == 2:
            stream = sides.draft.engine.runner.streams[-1]
            stream.hold(gate)

    made.after_round = stall
    made.run(after_verify=gate.set)
    assert made.end.reason == pb.GRANT_END_REASON_LATE and "did not answer" in made.end.message
    check(sides, made)
    assert sides.verify.bell.alive() and sides.draft.bell.alive()
    goes_on(sides, made, 2)


@pytest.mark.parametrize("gone", ["verify", "draft"])
def test_turns_end_when_the_other_side_is_gone(sides: Any, gone: str) -> None:
    made = Grant(sides, PROMPTS[:2], 200, 2, Decoding())

    def leave(step: int) -> None:
        if step == 2:
            getattr(sides, gone).bell.close()

    made.after_round = leave
    made.run()
    # The kernel tells, long before either would be late.
    assert made.end.reason == pb.GRANT_END_REASON_PEER
    assert made.draft_end is not None and made.draft_end.reason == pb.GRANT_END_REASON_PEER
    check(sides, made)


def test_turns_end_when_the_coordinator_is_gone(sides: Any) -> None:
    made = Grant(sides, PROMPTS[:1], 200, 2, Decoding())
    running = grant_loop.run(
        VERIFY, sides.verify.session, made.asked["verify"], sides.verify.bell,
        made.controls["verify"], lambda *_: None,
    )  # fmt: skip
    made.threads[1].start()
    next(running)
    running.close()  # type: ignore[attr-defined]
    made.threads[1].join(60)
    assert not made.threads[1].is_alive() and not sides.draft.bell.alive()
    assert made.draft_end is not None and made.draft_end.reason == pb.GRANT_END_REASON_PEER


NOT_SIMPLE = {
    "penalty": Decoding(repetition_penalty=1.2),
    "top_k": Decoding(temperature=0.7, top_k=5, rule=COUPLED),
    "rejection": Decoding(temperature=0.7, rule=REJECTION),
    "logprobs": Decoding(logprobs=2),
}


@pytest.mark.parametrize("decoding", NOT_SIMPLE)
def test_turns_that_the_device_cannot_take_are_left_to_the_host(sides: Any, decoding: str) -> None:
    made = Grant(sides, PROMPTS[:1], 20, 2, NOT_SIMPLE[decoding]).run()
    assert made.end.reason == pb.GRANT_END_REASON_HOST and made.end.rounds == 0
    assert "temperature and noise alone" in made.end.message
    assert made.draft_end is not None and made.draft_end.reason == pb.GRANT_END_REASON_HOST
    assert made.logs == [PROMPTS[0]]
    goes_on(sides, made, 2)


@pytest.mark.parametrize("busy", ["verify", "draft"])
def test_turns_are_left_to_the_host_while_another_stream_has_the_engine(
    sides: Any, busy: str
) -> None:
    made = Grant(sides, PROMPTS[:1], 20, 2, Decoding())
    lock, done = getattr(sides, busy).engine.lock, threading.Event()
    holder = threading.Thread(
        target=lambda: (lock.acquire(), taken.set(), done.wait(), lock.release())
    )
    taken = threading.Event()
    holder.start()
    taken.wait(60)
    try:
        made.run()
    finally:
        done.set()
        holder.join()
    ends = {"verify": made.end, "draft": made.draft_end}
    assert ends[busy] is not None and ends[busy].reason == pb.GRANT_END_REASON_HOST
    assert "another coordinator" in ends[busy].message
    assert made.end.rounds == 0
    goes_on(sides, made, 2)


def test_turns_without_device_memory_are_left_to_the_host(sides: Any) -> None:
    for side in (sides.verify, sides.draft):
        side.bell.device = None
    made = Grant(sides, PROMPTS[:1], 20, 2, Decoding()).run()
    assert made.end.reason == pb.GRANT_END_REASON_HOST
    assert made.end.message == "draft and verifier share no device memory"


@pytest.mark.parametrize("rule", DECODINGS)
def test_turns_beside_a_row_that_is_not_finite_are_left_to_the_host(sides: Any, rule: str) -> None:
    """What was proposed beyond the place does not end the text; the host finds where it does."""
    decoding, (prompt,) = DECODINGS[rule], PROMPTS[:1]
    own = replace(decoding, prompt_len=len(prompt), seed=decoding.seed + 1)
    whole = alone(sides.verify.engine, prompt, 30, own)
    broken = next(t for at, t in enumerate(whole) if at > 12 and t not in whole[:at])
    table = sides.verify.engine.runner._embedding
    kept = table[broken].clone()
    table.data[broken] = float("nan")
    try:
        made = Grant(sides, [prompt], 30, 4, decoding).run()
        log, session = made.logs[0], sides.verify.session
        if sides.twin:
            assert made.end.reason == pb.GRANT_END_REASON_HOST
        for _ in range(30):
            item = VerifyItem(1, 1, len(log) - 1, (log[-1],), (broken,) * 3)
            result = session.round([item])
            if result.refusals:
                break
            verdict = result.answers[0]
            log += [*[broken] * verdict.num_accepted, verdict.next_token]
        assert log == whole[: whole.index(broken) + 1]
    finally:
        table.data[broken] = kept


@pytest.mark.parametrize("where", ["on the way", "at the start"])
def test_turns_end_where_the_base_writes_what_the_draft_lacks(runners: Any, where: str) -> None:
    """A base padded wider than its draft: the draft drops the sequence, as over messages."""
    base, narrow = runners[0], runner(1, 24)
    whole = alone(VerifyEngine(base, 4), [3, 1, 4], 40, Decoding(prompt_len=3, seed=1))
    first = next(at for at, token in enumerate(whole) if token >= 24)
    with paired(base, narrow) as sides:
        prompt = whole[: first + 1] if where == "at the start" else whole[: max(3, first - 1)]
        made = Grant(sides, [prompt], 20, 3, Decoding()).run()
        assert made.logs[0] == whole[: len(made.logs[0])]
        assert made.draft_end is not None
        assert made.draft_end.reason == pb.GRANT_END_REASON_REFUSED
        assert "outside the vocabulary of 24" in made.draft_end.message
        assert made.end.reason == pb.GRANT_END_REASON_REVOKED
