"""The n-gram draft behind sessions: the pointer contract, admission, and what it proposes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.draft_service.__main__ import build
from outrider.draft_service.ngram.automaton import BYTES_PER_TOKEN
from outrider.draft_service.ngram.engine import NgramEngine
from outrider.shared.config.schema import DraftConfig, VerifyConfig, load
from outrider.shared.config.setting import Setting
from outrider.shared.core.errors import ConfigError, RefusalCode, SequenceRefused
from outrider.shared.core.rules import COUPLED, GREEDY, REJECTION, Rule
from outrider.shared.core.types import Decoding, OpenSequence, ProposeItem, SparseRow
from outrider.shared.rounds.calibration import calibrate, plan_for

TEXT = (1, 2, 3, 4, 5, 6, 1, 2, 3)


def engine(path: str = "ngram", tokens: int = 1000, **settings: Any) -> NgramEngine:
    made = build(DraftConfig(path=path, arena_bytes=tokens * BYTES_PER_TOKEN, **settings), print)
    assert isinstance(made, NgramEngine)
    return made


def opened(made: NgramEngine, capacity: int = 200, **decoding: Any) -> Any:
    session = made.connect()
    session.open(OpenSequence(1, 1, capacity, Decoding(**decoding)))
    return session


def propose(session: Any, base_len: int, append: tuple[int, ...], k: int) -> tuple[int, ...]:
    result = session.round([ProposeItem(1, 1, base_len, append, k)])
    assert not result.refusals, result.refusals
    (answer,) = result.answers
    assert answer.committed_len == base_len + len(append)
    return tuple(answer.tokens)


def refused(session: Any, item: ProposeItem) -> tuple[RefusalCode, int]:
    (one,) = session.round([item]).refusals
    return RefusalCode(one.code), one.held_len


def test_ngram_proposes_what_followed_the_longest_match() -> None:
    session = opened(engine("ngram:2"))
    assert propose(session, 0, (1, 2, 3, 4, 5, 6), 8) == ()
    assert propose(session, 6, (1,), 8) == ()  # a match of one is too short
    assert propose(session, 7, (2,), 8)[:1] == (3,)
    assert propose(session, 8, (3,), 1) == (4,)
    assert propose(session, 9, (), 0) == ()


@pytest.mark.parametrize(("least", "found"), [(1, True), (3, True), (4, False)])
def test_ngram_takes_no_shorter_match_than_asked(least: int, found: bool) -> None:
    assert bool(propose(opened(engine(f"ngram:{least}")), 0, TEXT, 4)) == found


@pytest.mark.parametrize("k", [0, 1, 2, 5])
def test_ngram_proposes_no_more_than_k(k: int) -> None:
    assert len(propose(opened(engine()), 0, TEXT * 9, k)) == k


def test_ngram_goes_on_from_whatever_was_accepted() -> None:
    # Like a model's draft: kept is what was accepted, but for the proposal's last token.
    for accepted in range(5):
        session = opened(engine())
        n = len(TEXT * 4)
        offered = propose(session, 0, TEXT * 4, 4)
        log = (*TEXT * 4, *offered[:accepted], 77)
        kept = n + min(accepted, 3)
        again = propose(session, kept, log[kept:], 4)
        fresh = propose(opened(engine("ngram:1")), 0, (*log,), 4)
        assert again == fresh == ()  # 77 is new
        held = refused(session, ProposeItem(1, 1, len(log) + 1, (5,), 2))
        assert held == (RefusalCode.KV_MISSING, len(log))


def test_ngram_message_sent_again_has_the_same_effect() -> None:
    session = opened(engine())
    item = ProposeItem(1, 1, 0, TEXT * 3, 4)
    (once,) = session.round([item]).answers
    (again,) = session.round([item]).answers
    assert once == again and len(once.tokens) == 4
    chunks = opened(engine())
    propose(chunks, 0, TEXT, 0)
    assert propose(chunks, len(TEXT), TEXT * 2, 4) == once.tokens


@given(
    st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(0, 2), max_size=6)), max_size=12)
)
def test_ngram_is_where_its_log_says_whatever_was_sent_before(messages: Any) -> None:
    # Rolled back at will and with other tokens, which no sound coordinator would do.
    session = opened(made := engine(tokens=200))
    log: list[int] = []
    for back, append in messages:
        base_len = max(0, len(log) - back)
        log = [*log[:base_len], *append, 1]
        propose(session, base_len, tuple(log[base_len:]), 3)
    held, (other,) = session._held.get(1), [opened(engine(tokens=200))]
    propose(other, 0, tuple(log), 3) if log else None
    mine, fresh = held.extent.automaton, other._held[1].extent.automaton
    assert mine.text(0, 200) == log
    assert (mine.match_len, mine.match_end) == (fresh.match_len, fresh.match_end)
    session.release()
    assert made.info().arena_tokens_used == 0


@pytest.mark.parametrize("rule", [GREEDY, COUPLED, REJECTION])
def test_ngram_is_certain_of_its_proposal_where_the_rule_asks(rule: Rule) -> None:
    session = opened(engine(), temperature=0.0 if rule is GREEDY else 0.8, rule=rule)
    (answer,) = session.round([ProposeItem(1, 1, 0, TEXT * 3, 3)]).answers
    rows = tuple(SparseRow((token,), (1.0,)) for token in answer.tokens)
    assert len(answer.tokens) == 3 and answer.rows == (rows if rule is REJECTION else ())


def test_ngram_admits_what_fits_and_refuses_the_rest() -> None:
    made = engine(tokens=100)
    session = opened(made, 60)
    for sequence_id, capacity in ((2, 41), (3, 101)):
        with pytest.raises(SequenceRefused) as error:
            session.open(OpenSequence(sequence_id, 1, capacity, Decoding()))
        assert error.value.code == RefusalCode.NO_CAPACITY
    session.open(OpenSequence(4, 1, 40, Decoding()))
    assert made.info().arena_tokens_used == made.info().arena_tokens == 100
    assert refused(session, ProposeItem(4, 1, 0, (1,) * 38, 4))[0] == RefusalCode.INVALID
    assert propose(session, 0, TEXT, 4)  # the one that is there goes on
    session.release()
    assert made.info().arena_tokens_used == 0


def test_ngram_samples_share_the_prompt() -> None:
    session = opened(engine())
    propose(session, 0, TEXT * 3, 0)
    session.open(OpenSequence(2, 1, 200, Decoding(), parent_id=1, prefix_len=26))
    item = ProposeItem(2, 1, 26, (TEXT * 3)[26:], 4)
    (answer,) = session.round([item]).answers
    assert answer.tokens == propose(session, 26, (TEXT * 3)[26:], 4) != ()


@pytest.mark.parametrize(
    "item",
    [ProposeItem(1, 1, 0, (), 2), ProposeItem(1, 1, 0, (1,), 17), ProposeItem(1, 1, 0, (1,), -1)],
)
def test_ngram_refuses_what_a_model_refuses(item: ProposeItem) -> None:
    assert refused(opened(engine()), item)[0] == RefusalCode.INVALID


def test_ngram_says_that_it_is_no_model() -> None:
    info = engine().info()
    facts = info.facts
    assert (facts.name, facts.is_model, facts.parameters, facts.vocab_size) == (
        "ngram",
        False,
        0,
        0,
    )
    assert engine(max_positions=50).info().facts.max_positions == 50


def test_ngram_rounds_can_be_timed() -> None:
    made = engine(tokens=10_000)
    points = calibrate(made, plan_for(made))
    assert {(1, 1), (1, 8), (8, 8)} <= {(one.sequences, one.amount) for one in points}
    assert made.info().arena_tokens_used == 0


@pytest.mark.parametrize(
    "name", ["ngram:0", "ngram:65", "ngram:", "ngram:x", "ngram:-1", "ngram: 2"]
)
def test_ngram_with_a_bad_number_is_refused_before_anything_starts(name: str) -> None:
    with pytest.raises(ConfigError, match=r"draft\.path = .*; must be .* N .* from 1 to 64"):
        load(None, flags=[Setting("draft", "path", name, "flag --draft", text=True)])


def test_ngram_is_no_base() -> None:
    with pytest.raises(ConfigError, match="ngram is a draft"):
        VerifyConfig(path="ngram")


def test_ngram_needs_room_for_a_token() -> None:
    with pytest.raises(
        ConfigError, match=f"arena_bytes: got 7; must be at least {BYTES_PER_TOKEN}"
    ):
        build(DraftConfig(path="ngram", arena_bytes=7), print)


def test_ngram_draft_imports_no_torch() -> None:
    program = (
        "import sys\n"
        "from outrider.draft_service.__main__ import build\n"
        "from outrider.draft_service.service import make_servicer\n"
        "from outrider.shared.config.schema import DraftConfig\n"
        "from outrider.shared.process.grpc_server import Server\n"
        "from outrider.shared.rounds import program, servicer\n"
        "engine = build(DraftConfig(path='ngram'), print)\n"
        "program._costs(DraftConfig(path='ngram'), engine, print)\n"
        "make_servicer().attach(engine, device=program._device_of(engine))\n"
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
