"""Sequences that are over and whose KV stays: taken over by copy, and gone when room is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from outrider.draft_service.engine import DraftEngine
from outrider.shared.core.errors import RefusalCode, SequenceRefused
from outrider.shared.core.types import Decoding, OpenSequence, ProposeItem, VerifyItem
from outrider.shared.model.runner import RotarySwitch
from outrider.verify_service.engine import VerifyEngine
from outrider_testing import engines

GREEDY = Decoding()
PROMPT = tuple((5 * i + 1) % 97 for i in range(40))
WINDOW = 8
TOKEN_BYTES = 256
"""Of each of the models: two layers, two heads of eight numbers."""


def llama() -> Any:
    """A random Llama."""
    return engines.tiny_llama(1)


MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "cpu": (llama, {}),
    "llama": (llama, {"runner": "llama"}),
    "generic": (llama, {"runner": "generic"}),
    "gpt2": (lambda: engines.tiny_gpt2(1), {}),
    "windowed": (lambda: engines.tiny_gemma2(1, window=WINDOW), {"prefill_chunk": 6, "max_k": 4}),
}


@pytest.fixture(params=MODELS)
def world(request: pytest.FixtureRequest) -> tuple[Any, VerifyEngine]:
    make, options = MODELS[request.param]
    return make(), VerifyEngine(engines.runner(make(), **options), 4)


def written(session: Any, number: int, log: list[int], held: int, count: int) -> list[int]:
    """``count`` tokens after ``log``, of which the service has the KV of ``held``."""
    made: list[int] = []
    while len(made) < count:
        whole = [*log, *made]
        (answer,) = session.round([VerifyItem(number, 1, held, tuple(whole[held:]))]).answers
        held = len(whole)
        made.append(answer.next_token)
    return made


def test_a_second_turn_forwards_only_what_is_new(world: tuple[Any, VerifyEngine]) -> None:
    model, engine = world
    session = engine.connect()
    session.open(OpenSequence(1, 1, 100, GREEDY))
    first = [*PROMPT, *written(session, 1, [*PROMPT], 0, 9)]
    session.cache(1, len(first) - 1)
    info = engine.info()
    assert (info.sequences, info.cached) == (0, 1)
    assert (info.arena_tokens_used, info.arena_tokens_cached) == (0, len(first) - 1)
    second = [*first[:-1], 3, 1, 4, 1, 5]
    session.open(OpenSequence(2, 1, 80, GREEDY, 1, len(first) - 1, copy=True))
    answers = session.round([VerifyItem(2, 1, len(first) - 1, tuple(second[len(first) - 1 :]))])
    assert answers.rows == 5
    made = [answers.answers[0].next_token]
    made += written(session, 2, [*second, *made], len(second), 11)
    assert made == engines.reference(model, second, 12)
    # The donor is as it was.
    session.close(2)
    session.open(OpenSequence(3, 1, 80, GREEDY, 1, len(first) - 1, copy=True))
    assert written(session, 3, second, len(first) - 1, 12) == made
    session.release()
    info = engine.info()
    assert (info.arena_tokens_used, info.arena_tokens_cached, info.cached) == (0, 0, 0)
    assert engine.runner.arena.used == 0


def test_a_running_sequence_is_a_donor_and_goes_on(world: tuple[Any, VerifyEngine]) -> None:
    model, engine = world
    session = engine.connect()
    session.open(OpenSequence(1, 1, 100, GREEDY))
    log = [*PROMPT, *written(session, 1, [*PROMPT], 0, 3)]
    session.open(OpenSequence(2, 1, 90, GREEDY, 1, len(log) - 1, copy=True))
    other = [*log[:-1], 8, 8]
    mine = written(session, 1, log, len(log) - 1, 8)
    session.close(1)
    assert written(session, 2, other, len(log) - 1, 8) == engines.reference(model, other, 8)
    assert mine == engines.reference(model, log, 8)


@pytest.mark.parametrize("prefix", [5, 39, 41, 60])
def test_of_what_a_donor_lacks_the_rest_is_asked_for(prefix: int) -> None:
    engine = VerifyEngine(engines.runner(engines.tiny_llama(1)), 4)
    session = engine.connect()
    session.open(OpenSequence(1, 1, 100, GREEDY))
    (whole,) = session.round([VerifyItem(1, 1, 0, PROMPT)]).answers
    session.cache(1, 39)
    session.open(OpenSequence(2, 1, 100, GREEDY, 1, prefix, copy=True))
    result = session.round([VerifyItem(2, 1, prefix, (1,))])
    if prefix <= 39:
        assert not result.refusals
    else:
        (refusal,) = result.refusals
        assert (refusal.code, refusal.held_len) == (RefusalCode.KV_MISSING, 39)
    begin = min(prefix, 39)
    (answer,) = session.round([VerifyItem(2, 1, begin, PROMPT[begin:])]).answers
    assert answer.next_token == whole.next_token


def test_what_a_ring_has_lost_is_not_taken_over() -> None:
    engine = VerifyEngine(
        engines.runner(engines.tiny_gemma2(1, window=WINDOW), prefill_chunk=6, max_k=4), 4
    )
    session = engine.connect()
    session.open(OpenSequence(1, 1, 100, GREEDY))
    (whole,) = session.round([VerifyItem(1, 1, 0, PROMPT)]).answers
    session.cache(1, len(PROMPT))
    session.open(OpenSequence(2, 1, 100, GREEDY, 1, 20, copy=True))
    (refusal,) = session.round([VerifyItem(2, 1, 20, PROMPT[20:])]).refusals
    assert (refusal.code, refusal.held_len) == (RefusalCode.KV_MISSING, 0)
    (answer,) = session.round([VerifyItem(2, 1, 0, PROMPT)]).answers
    assert answer.next_token == whole.next_token


def test_kv_of_another_rotary_factor_is_not_taken_over() -> None:
    """A prompt longer than the border is long from its first token on."""
    engine = VerifyEngine(engines.runner(engines.tiny_llama(1)), 4)
    engine.runner.switch = RotarySwitch(border=30, anew=False)
    session = engine.connect()
    session.open(OpenSequence(1, 1, 100, Decoding(prompt_len=20)))
    session.round([VerifyItem(1, 1, 0, PROMPT)])
    session.cache(1, len(PROMPT))
    for number, prompt_len, length, held in ((2, 20, 39, 39), (3, 40, 39, 0), (4, 20, 10, 10)):
        decoding = Decoding(prompt_len=prompt_len)
        session.open(OpenSequence(number, 1, 100, decoding, 1, length, copy=True))
        assert session.held(number).extent.valid_len == held


def test_cached_sequences_give_way_the_oldest_first_whosever_they_are() -> None:
    engine = VerifyEngine(engines.runner(engines.tiny_llama(1), arena_bytes=200 * TOKEN_BYTES), 4)
    total = engine.info().arena_tokens
    assert total == 200
    one, two = engine.connect(), engine.connect()
    for number in (1, 2, 3):
        session = two if number == 2 else one
        session.open(OpenSequence(number, 1, 45, GREEDY))
        session.round([VerifyItem(number, 1, 0, PROMPT)])
        session.cache(number, len(PROMPT))
    assert engine.info().arena_tokens_cached == 120
    one.open(OpenSequence(4, 1, 80, GREEDY))  # beside all of them
    assert (engine.info().cached, one.round([]).evicted) == (3, [])
    one.open(OpenSequence(5, 1, 60, GREEDY))  # needs what two of them have
    assert engine.info().cached == 1
    assert (one.round([]).evicted, two.round([]).evicted) == ([1], [2])
    # In vain: nothing gives way.
    with pytest.raises(SequenceRefused) as error:
        two.open(OpenSequence(6, 1, 120, GREEDY))
    assert error.value.code == RefusalCode.NO_CAPACITY
    assert engine.info().cached == 1
    # Its donor gives way too where there is no other room, and the prompt is asked for.
    one.close(4)
    one.open(OpenSequence(7, 1, 140, GREEDY, 3, 39, copy=True))
    result = one.round([VerifyItem(7, 1, 39, PROMPT[39:])])
    assert result.evicted == [3]
    assert [(one.code, one.held_len) for one in result.refusals] == [(RefusalCode.KV_MISSING, 0)]
    assert one.round([VerifyItem(7, 1, 0, PROMPT)]).answers
    one.release()
    two.release()
    assert engine.runner.arena.used == 0


def test_a_prompt_that_samples_share_stays_while_they_live() -> None:
    engine = VerifyEngine(engines.runner(engines.tiny_llama(1), arena_bytes=200 * TOKEN_BYTES), 4)
    session = engine.connect()
    session.open(OpenSequence(1, 1, 60, GREEDY))
    session.round([VerifyItem(1, 1, 0, PROMPT)])
    session.open(OpenSequence(2, 1, 60, GREEDY, 1, 39))
    session.cache(1, 40)
    with pytest.raises(SequenceRefused):
        session.open(OpenSequence(3, 1, 150, GREEDY))
    assert engine.info().cached == 1, "it would have been in vain"
    (answer,) = session.round([VerifyItem(2, 1, 39, PROMPT[39:])]).answers
    session.cache(2, 40)  # it would hold on to all of the prompt
    assert session.round([]).evicted == [2]
    session.open(OpenSequence(3, 1, 190, GREEDY))
    assert session.round([]).evicted == [1]
    (again,) = session.round([VerifyItem(3, 1, 0, PROMPT)]).answers
    assert again.next_token == answer.next_token


def test_caching_nothing_counts_as_evicted_and_an_unknown_id_as_nothing() -> None:
    engine = VerifyEngine(engines.runner(engines.tiny_llama(1)), 4)
    session = engine.connect()
    session.open(OpenSequence(1, 1, 60, GREEDY))
    session.cache(1, 20)  # nothing was taken in
    session.cache(9, 20)
    assert session.round([]).evicted == [1]
    assert engine.runner.arena.used == 0


def test_an_id_that_comes_again_leaves_nothing_behind() -> None:
    engine = VerifyEngine(engines.runner(engines.tiny_llama(1)), 4)
    session = engine.connect()
    for _ in range(2):
        session.open(OpenSequence(1, 1, 60, GREEDY))
        session.round([VerifyItem(1, 1, 0, PROMPT)])
        session.cache(1, 20)
    assert (engine.info().cached, engine.info().arena_tokens_cached) == (1, 20)
    session.close(1)
    assert (engine.info().cached, engine.runner.arena.used) == (0, 0)


def test_a_draft_takes_over_too() -> None:
    engine = DraftEngine(engines.runner(engines.tiny_llama(2, layers=1)), 4)
    session = engine.connect()
    session.open(OpenSequence(1, 1, 100, GREEDY))
    (whole,) = session.round([ProposeItem(1, 1, 0, PROMPT, 4)]).answers
    session.cache(1, len(PROMPT))
    session.open(OpenSequence(2, 1, 100, GREEDY, 1, 39, copy=True))
    result = session.round([ProposeItem(2, 1, 39, PROMPT[39:], 4)])
    assert (result.rows, result.answers[0].tokens) == (4, whole.tokens)


class CachedMachine(RuleBasedStateMachine):
    """Two streams over one small arena; what is written is what transformers writes.

    The model knows the logs that are live and cached, and where live ones lie.
    """

    model: Any
    engine: VerifyEngine
    known: dict[tuple[int, ...], int]

    def __init__(self) -> None:
        super().__init__()
        self.sessions = [self.engine.connect(), self.engine.connect()]
        self.live: dict[tuple[int, int], list[int]] = {}
        self.cached: dict[tuple[int, int], list[int]] = {}
        self.count = 0

    def teardown(self) -> None:
        for session in self.sessions:
            session.release()
        assert self.engine.runner.arena.used == 0
        assert all(one.used == 0 for one in self.engine.runner.arena.allocators)
        assert self.engine.info().cached == self.engine.info().sequences == 0

    def next(self, log: list[int]) -> int:
        key = tuple(log)
        if key not in self.known:
            with torch.inference_mode():
                logits = self.model(input_ids=torch.tensor([log]), use_cache=False).logits
            self.known[key] = int(logits[0, -1].argmax())
        return self.known[key]

    @rule(
        side=st.integers(0, 1),
        data=st.data(),
        tail=st.lists(st.integers(0, 96), min_size=1, max_size=6),
        more=st.integers(4, 20),
    )
    def begin(self, side: int, data: st.DataObject, tail: list[int], more: int) -> None:
        donors = {
            number: log
            for (of, number), log in [*self.live.items(), *self.cached.items()]
            if of == side
        }
        self.count += 1
        number, session = self.count, self.sessions[side]
        parent, log, prefix = None, list(tail), 0
        if donors and data.draw(st.booleans()):
            parent = data.draw(st.sampled_from(sorted(donors)))
            prefix = data.draw(st.integers(1, len(donors[parent])))
            log = [*donors[parent][:prefix], *tail]
        capacity = len(log) + more + 5
        request = OpenSequence(number, 1, capacity, GREEDY, parent, prefix, copy=parent is not None)
        try:
            session.open(request)
        except SequenceRefused:
            assert not self.fits(capacity), "refused although live ones leave room"
            return
        # What is held is asked for as by a coordinator that thinks all of it is there.
        result = session.round([VerifyItem(number, 1, prefix, tuple(log[prefix:]))])
        self.note(side, result)
        if result.refusals:
            assert parent is not None
            (refusal,) = result.refusals
            assert refusal.code == RefusalCode.KV_MISSING and refusal.held_len < prefix
            begin = refusal.held_len
            result = session.round([VerifyItem(number, 1, begin, tuple(log[begin:]))])
        assert result.answers[0].next_token == self.next(log)
        self.live[side, number] = [*log, result.answers[0].next_token]

    @precondition(lambda self: self.live)
    @rule(data=st.data(), right=st.integers(0, 4), wrong=st.integers(0, 2))
    def go_on(self, data: st.DataObject, right: int, wrong: int) -> None:
        side, number = data.draw(st.sampled_from(sorted(self.live)))
        log = self.live[side, number]
        proposal: list[int] = []
        for _ in range(right):
            proposal.append(self.next([*log, *proposal]))
        own = self.next([*log, *proposal])
        proposal += [(own + 1) % 97] * wrong
        room = self.sessions[side].held(number).extent.capacity
        if len(log) + len(proposal) > room or len(proposal) > 4:
            return
        item = VerifyItem(number, 1, len(log) - 1, (log[-1],), tuple(proposal))
        result = self.sessions[side].round([item])
        self.note(side, result)
        (answer,) = result.answers
        assert (answer.num_accepted, answer.next_token) == (right, own)
        self.live[side, number] = [*log, *proposal[:right], own]

    @precondition(lambda self: self.live)
    @rule(data=st.data(), keep=st.booleans(), back=st.integers(0, 3))
    def end(self, data: st.DataObject, keep: bool, back: int) -> None:
        side, number = data.draw(st.sampled_from(sorted(self.live)))
        log = self.live.pop((side, number))
        if not keep:
            self.sessions[side].close(number)
            return
        length = len(log) - 1 - back
        self.sessions[side].cache(number, length)
        if length > 0:
            self.cached[side, number] = log[:length]
        self.note(side, self.sessions[side].round([]))

    @precondition(lambda self: self.cached)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        side, number = data.draw(st.sampled_from(sorted(self.cached)))
        self.cached.pop((side, number))
        self.sessions[side].close(number)

    def note(self, side: int, result: Any) -> None:
        for number in result.evicted:
            self.cached.pop((side, number), None)

    def fits(self, capacity: int) -> bool:
        """Whether there is room for a sequence between live ones."""
        live = [held.extent for one in self.sessions for held in one._held.values()]
        for number, pool in enumerate(self.engine.runner.arena.pools):
            gap = at = 0
            for start, size in sorted(extent.places[number] for extent in live):
                gap, at = max(gap, start - at), start + size
            if max(gap, pool.tokens - at) < pool.place_size(capacity):
                return False
        return True

    @invariant()
    def service_and_model_agree(self) -> None:
        for side, session in enumerate(self.sessions):
            self.note(side, session.round([]))
            assert set(session._held) == {n for of, n in self.live if of == side}
            assert session._cached == {n for of, n in self.cached if of == side}
        cached = self.engine.cached
        for (side, number), log in self.cached.items():
            found = cached.find((self.sessions[side], number))
            assert found is not None and found.log == log
            assert found.extent.valid_len == len(log)
        info = self.engine.info()
        assert (info.sequences, info.cached) == (len(self.live), len(self.cached))
        assert info.arena_tokens_cached == sum(map(len, self.cached.values()))
        held = [held for one in self.sessions for held in one._held.values()]
        assert info.arena_tokens_used == sum(one.extent.places[0][1] for one in held)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu", "windowed"])
def test_cached_sequences_change_no_token_and_leak_nothing(name: str) -> None:
    make, options = MODELS[name]
    runner = engines.runner(make(), arena_bytes=160 * TOKEN_BYTES, max_sequences=8, **options)

    class Machine(CachedMachine):
        pass

    Machine.model, Machine.engine, Machine.known = make(), VerifyEngine(runner, 4), {}
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=15,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
