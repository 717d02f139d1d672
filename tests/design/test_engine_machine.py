"""The real engines over a tiny model, against lists of tokens and full recomputation.

The machine plays a coordinator that may do everything the protocol allows, and some of what it
forbids: batches of ragged rounds, proposals that are right for any number of tokens, rollback to
any position, answers that get lost, messages sent again, old epochs, too much of everything. The
model of a service is two lists: the committed log, and the tokens whose KV counts as valid.
What the tokens should be comes from transformers' own forward over the whole text, without a
cache. Where layers have a sliding window, the model also keeps which positions each ring holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
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
from outrider.shared.core.rules import COUPLED
from outrider.shared.core.types import Decoding, OpenSequence, ProposeItem, VerifyItem
from outrider.shared.sampling.choose import RowContext, choose, process
from outrider.verify_service.engine import VerifyEngine
from outrider_testing import engines

MAX_K, CHUNK, WINDOW = 4, 5, 6
SLACK = max(CHUNK, MAX_K + 1)
GREEDY = Decoding()
SAMPLED = Decoding(temperature=0.8, top_k=20, seed=7, rule=COUPLED)


class Oracle:
    """What a model would write, from transformers' forward over all tokens, every time anew."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._known: dict[tuple[Any, ...], int] = {}

    def next(self, tokens: Sequence[int], decoding: Decoding) -> int:
        """The token after ``tokens``."""
        key = (decoding, *tokens)
        if key not in self._known:
            with torch.inference_mode():
                ids = torch.tensor([list(tokens)])
                logits = self.model(input_ids=ids, use_cache=False).logits[0, -1:]
                context = [RowContext(decoding, list(tokens))]
                self._known[key] = choose(process(logits, context), context)[0]
        return self._known[key]

    def write(self, tokens: Sequence[int], count: int, decoding: Decoding) -> list[int]:
        """The ``count`` tokens after ``tokens``."""
        log = list(tokens)
        for _ in range(count):
            log.append(self.next(log, decoding))
        return log[len(tokens) :]


@dataclass(frozen=True)
class World:
    """A pair of engines and what is known of them."""

    verify: VerifyEngine
    draft: DraftEngine
    base: Oracle
    helper: Oracle
    vocab: int
    window: int | None


class Ring:
    """Which position each slot of a ring holds; without a window, everything stays."""

    def __init__(self, window: int | None, capacity: int) -> None:
        self.window = window
        self.size = 0 if window is None else min(capacity, window + SLACK)
        self.slots: dict[int, int] = {}

    def write(self, start: int, end: int) -> None:
        if self.window is not None:
            for position in range(start, end):
                self.slots[position % self.size] = position

    def holds(self, length: int) -> bool:
        """Whether all that a row at position ``length`` reads is there."""
        if self.window is None:
            return True
        needed = range(max(0, length - self.window + 1), length)
        return all(self.slots.get(p % self.size) == p for p in needed)


@dataclass
class Side:
    """One service's view of a sequence: the tokens whose KV is valid."""

    ring: Ring
    valid: list[int] = field(default_factory=list)
    sent: list[tuple[Any, Any]] = field(default_factory=list)
    """Items of this epoch with what they were answered."""


@dataclass
class Text:
    """One sequence as the coordinator knows it."""

    key: int
    epoch: int
    capacity: int
    decoding: Decoding
    log: list[int]
    verify: Side
    draft: Side


def common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common prefix."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))))


class EngineMachine(RuleBasedStateMachine):
    """See the module."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.verify = self.world.verify.connect()
        self.draft = self.world.draft.connect()
        self.texts: dict[int, Text] = {}
        self.epochs: dict[int, int] = {}

    def teardown(self) -> None:
        for session, engine in self.sides():
            session.release()
            session.release()
            assert engine.info().arena_tokens_used == 0
            assert engine.info().sequences == 0

    def sides(self) -> list[tuple[Any, Any]]:
        return [(self.verify, self.world.verify), (self.draft, self.world.draft)]

    def pick(self, number: int) -> Text:
        return self.texts[sorted(self.texts)[number % len(self.texts)]]

    def some(self) -> bool:
        return bool(self.texts)

    # --- admit and free -------------------------------------------------------------------------

    @rule(
        key=st.integers(0, 3),
        prompt=st.lists(st.integers(0, 96), min_size=1, max_size=9),
        capacity=st.integers(10, 40),
        sampled=st.booleans(),
    )
    def admit(self, key: int, prompt: list[int], capacity: int, sampled: bool) -> None:
        # A live key is opened anew, under a higher epoch: the old extent is freed first.
        epoch = self.epochs[key] = self.epochs.get(key, 0) + 1
        decoding = SAMPLED if sampled else GREEDY
        self.texts.pop(key, None)
        opened = 0
        for session, engine in self.sides():
            if epoch % 2:
                session.close(key)
            try:
                session.open(OpenSequence(key, epoch, capacity, decoding))
                opened += 1
            except SequenceRefused as error:
                assert error.code == RefusalCode.NO_CAPACITY
                assert str(engine.info().arena_tokens) in str(error)
        if opened < 2:
            self.verify.close(key)
            self.draft.close(key)
            return
        window = self.world.window
        self.texts[key] = Text(
            key,
            epoch,
            capacity,
            decoding,
            prompt,
            Side(Ring(window, capacity)),
            Side(Ring(window, capacity)),
        )

    @precondition(some)
    @rule(number=st.integers(0, 3))
    def open_again(self, number: int) -> None:
        text = self.pick(number)
        for session, _ in self.sides():
            session.open(OpenSequence(text.key, text.epoch, text.capacity, text.decoding))
            with pytest.raises(SequenceRefused) as caught:
                session.open(OpenSequence(text.key, text.epoch - 1, text.capacity, text.decoding))
            assert caught.value.code == RefusalCode.STALE_EPOCH

    @precondition(some)
    @rule(number=st.integers(0, 3))
    def close(self, number: int) -> None:
        text = self.pick(number)
        del self.texts[text.key]
        for session, _ in self.sides():
            session.close(text.key)
            session.close(text.key)
        refused = self.verify.round([VerifyItem(text.key, text.epoch, 0, (1,))]).refusals
        assert [one.code for one in refused] == [RefusalCode.UNKNOWN]

    @rule(capacity=st.integers(100_000, 200_000))
    def exhaust(self, capacity: int) -> None:
        for session, engine in self.sides():
            # A sliding window alone never needs more than its ring.
            if engine.runner.arena.pools[0].window is not None:
                return
            used = engine.info().arena_tokens_used
            with pytest.raises(SequenceRefused, match=str(capacity)) as caught:
                session.open(OpenSequence(99, 1, capacity, GREEDY))
            assert caught.value.code == RefusalCode.NO_CAPACITY
            assert engine.info().arena_tokens_used == used

    # --- rounds ---------------------------------------------------------------------------------

    @precondition(some)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        """A chunk of the prompt, or of a log that is told anew from some position on."""
        text = self.pick(data.draw(st.integers(0, 3)))
        base = data.draw(st.integers(0, min(len(text.verify.valid), len(text.log))))
        upto = data.draw(st.integers(base, len(text.log)))
        item = VerifyItem(text.key, text.epoch, base, tuple(text.log[base:upto]), extend_only=True)
        self.ask_verify([(text, item, None)])

    @precondition(some)
    @rule(data=st.data())
    def speculate(self, data: st.DataObject) -> None:
        """One ragged round over some sequences, each accepted as far as is drawn."""
        asked = []
        for text in self.texts.values():
            if data.draw(st.booleans()):
                continue
            n = len(text.log)
            deepest = min(len(text.verify.valid), n - 1)
            base = max(0, deepest - data.draw(st.sampled_from([0, 0, 0, 1, 2, 5, 40])))
            k = data.draw(st.integers(0, MAX_K))
            accepted = data.draw(st.integers(0, k))
            own = self.world.base.write(text.log, accepted + 1, text.decoding)
            proposal = own[:accepted]
            if accepted < k:
                wrong = (own[accepted] + data.draw(st.integers(1, 96))) % self.world.vocab
                proposal = [*proposal, wrong, *([5] * (k - accepted - 1))]
            append = tuple(text.log[base:])
            item = VerifyItem(text.key, text.epoch, base, append, tuple(proposal))
            asked.append((text, item, own))
        if asked:
            seen = data.draw(st.sampled_from([True, True, True, False]))
            for text, own in self.ask_verify(asked):
                if seen:  # else the answer was lost, and the coordinator knows nothing of it
                    text.log += own

    def ask_verify(
        self, asked: list[tuple[Text, VerifyItem, list[int] | None]]
    ) -> list[tuple[Text, list[int]]]:
        """Sends items; checks answers and refusals; returns what was emitted."""
        result = self.verify.round([item for _, item, _ in asked])
        answers = {one.sequence_id: one for one in result.answers}
        refusals = {one.sequence_id: one for one in result.refusals}
        assert len(answers) + len(refusals) == len(asked)
        emitted = []
        for text, item, own in asked:
            end = item.base_len + len(item.append) + len(item.proposal)
            if self.refused(text, text.verify, item, end, refusals.get(text.key)):
                continue
            answer = answers[text.key]
            n = item.base_len + len(item.append)
            text.verify.ring.write(item.base_len, end)
            kept = 0 if own is None else len(own) - 1
            assert answer.num_accepted == kept
            assert answer.next_token == (None if own is None else own[-1])
            assert answer.committed_len == n + kept + (own is not None)
            text.verify.valid = text.log[:n] + list(item.proposal[:kept])
            text.verify.sent.append((item, own))
            if own is not None:
                emitted.append((text, own))
        return emitted

    @precondition(some)
    @rule(data=st.data())
    def propose(self, data: st.DataObject) -> None:
        """Proposals for some sequences; K = 0 takes in part of the log."""
        asked = []
        for text in self.texts.values():
            if data.draw(st.booleans()):
                continue
            k = data.draw(st.integers(0, MAX_K))
            n = len(text.log)
            upto = n if k else data.draw(st.integers(1, n))
            # The coordinator's discipline: only what is of the log may be relied on.
            deepest = min(common(text.draft.valid, text.log), upto - 1)
            base = max(0, deepest - data.draw(st.sampled_from([0, 0, 0, 1, 2, 40])))
            append = tuple(text.log[base:upto])
            asked.append((text, ProposeItem(text.key, text.epoch, base, append, k)))
        if asked:
            self.ask_draft(asked)

    def ask_draft(self, asked: list[tuple[Text, ProposeItem]]) -> None:
        """Sends items; checks answers and refusals."""
        result = self.draft.round([item for _, item in asked])
        answers = {one.sequence_id: one for one in result.answers}
        refusals = {one.sequence_id: one for one in result.refusals}
        for text, item in asked:
            n = item.base_len + len(item.append)
            end = n + max(item.k - 1, 0)
            if self.refused(text, text.draft, item, end, refusals.get(text.key)):
                continue
            answer = answers[text.key]
            history = text.draft.valid[: item.base_len] + list(item.append)
            own = self.world.helper.write(history, item.k, text.decoding)
            assert answer.committed_len == n
            assert list(answer.tokens) == own
            text.draft.ring.write(item.base_len, end)
            text.draft.valid = history + own[: max(item.k - 1, 0)]
            text.draft.sent.append((item, None))

    def refused(self, text: Text, side: Side, item: Any, end: int, refusal: Any) -> bool:
        """Whether the item should be refused; checks that it was, and how."""
        if end > text.capacity:
            assert refusal is not None and refusal.code == RefusalCode.INVALID
            assert str(text.capacity) in refusal.message
            return True
        if item.base_len > len(side.valid):
            assert refusal is not None and refusal.code == RefusalCode.KV_MISSING
            assert refusal.held_len == len(side.valid)
            return True
        if item.base_len == 0:
            side.ring.slots.clear()
        elif not side.ring.holds(item.base_len):
            assert refusal is not None and refusal.code == RefusalCode.KV_MISSING
            assert refusal.held_len == 0
            side.valid, side.ring.slots = [], {}
            return True
        assert refusal is None, refusal
        return False

    # --- messages that come twice, late, or wrong -------------------------------------------------

    @precondition(some)
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        """Any message of this epoch to the verifier again, the last one to the draft."""
        text = self.pick(data.draw(st.integers(0, 3)))
        if text.verify.sent:
            item, own = data.draw(st.sampled_from(text.verify.sent))
            self.ask_verify([(text, item, own)])
        if text.draft.sent:
            item, _ = text.draft.sent[-1]
            before = list(text.draft.valid)
            self.ask_draft([(text, item)])
            assert text.draft.valid in (before, []), "a repeated message changed the state"

    @precondition(some)
    @rule(number=st.integers(0, 3), beyond=st.integers(1, 5))
    def wrong(self, number: int, beyond: int) -> None:
        text = self.pick(number)
        key, epoch = text.key, text.epoch

        def code(session: Any, item: Any) -> RefusalCode:
            result = session.round([item])
            assert not result.answers
            return RefusalCode(result.refusals[0].code)

        for session, side, make in (
            (self.verify, text.verify, VerifyItem),
            (self.draft, text.draft, lambda *a: ProposeItem(*a, 1)),
        ):
            assert code(session, make(key, epoch - 1, 0, (1,))) == RefusalCode.STALE_EPOCH
            assert code(session, make(key, epoch + 1, 0, (1,))) == RefusalCode.UNKNOWN
            assert code(session, make(key, epoch, 0, ())) == RefusalCode.INVALID
            assert code(session, make(key, epoch, 0, (self.world.vocab,))) == RefusalCode.INVALID
            full = (1,) * (text.capacity + beyond)
            assert code(session, make(key, epoch, 0, full)) == RefusalCode.INVALID
            if len(side.valid) + beyond < text.capacity:
                missing = make(key, epoch, len(side.valid) + beyond, (1,))
                assert code(session, missing) == RefusalCode.KV_MISSING
            assert code(session, make(77, 1, 0, (1,))) == RefusalCode.UNKNOWN

    # --- invariants -------------------------------------------------------------------------------

    @invariant()
    def valid_lengths_agree(self) -> None:
        for session, name in ((self.verify, "verify"), (self.draft, "draft")):
            assert set(session._held) == set(self.texts)
            for key, held in session._held.items():
                side: Side = getattr(self.texts[key], name)
                assert held.epoch == self.texts[key].epoch
                assert held.extent.valid_len == len(side.valid)
                assert held.log[: held.extent.valid_len] == side.valid

    @invariant()
    def slots_are_conserved(self) -> None:
        for session, engine in self.sides():
            arena = engine.runner.arena
            for pool, allocator in enumerate(arena.allocators):
                owned = sorted(held.extent.places[pool] for held in session._held.values())
                assert sorted(allocator._used.items()) == owned
                for (start, size), (following, _) in pairwise(owned):
                    assert start + size <= following


def qwen_with_windows(seed: int, layers: int) -> Any:
    """A random Qwen2: full attention below, sliding windows above."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=engines.VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=["full_attention", "sliding_attention"][-layers:],
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    return Qwen2ForCausalLM(config).eval()


def llama(seed: int, layers: int) -> Any:
    """A random Llama: full attention."""
    return engines.tiny_llama(seed, layers=layers, hidden=16, max_position_embeddings=128)


MODELS: dict[str, tuple[Callable[[Any, int, int], Any], str, int | None, int]] = {
    "full attention": (llama, "auto", None, 1),
    "rings beside full attention": (qwen_with_windows, "generic", WINDOW, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_engines_agree_with_lists_and_full_recompute(name: str) -> None:
    make, kind, window, layers = MODELS[name]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sizes = {"runner": kind, "max_k": MAX_K, "prefill_chunk": CHUNK, "max_sequences": 4}
    try:
        base = engines.runner(make(1, layers), arena_bytes=9000 * layers, **sizes)
        draft = engines.runner(make(2, 1), arena_bytes=9000, **sizes)
        made = World(
            VerifyEngine(base, MAX_K),
            DraftEngine(draft, MAX_K),
            Oracle(make(1, layers)),
            Oracle(make(2, 1)),
            engines.VOCAB,
            window,
        )

        class Machine(EngineMachine):
            world = made

        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=40,
                stateful_step_count=40,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        torch.set_num_threads(threads)
