"""Paced models: they take the time that is asked for, and agree as often; else they are models."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from outrider.draft_service.engine import DraftEngine
from outrider.shared.config.schema import ModelConfig
from outrider.shared.core.errors import ConfigError
from outrider.shared.core.rules import COUPLED
from outrider.shared.core.types import Decoding, OpenSequence, ProposeItem, VerifyItem
from outrider.shared.model.loading import load_runner
from outrider.shared.model.locate import model_path
from outrider.shared.model.paced.loading import load_paced
from outrider.shared.model.paced.runner import PacedRunner
from outrider.shared.model.paced.spec import PacedSpec, parse
from outrider.shared.model.runner import Span
from outrider.verify_service.engine import VerifyEngine
from outrider_testing.engines import speculate

PROMPTS = [[0, 5, 6], [1, 5, 6], [2, 5, 6, 7, 8, 9], [3]]


def runner(asked: str, **changes: Any) -> Any:
    return load_runner(ModelConfig(path=f"paced:step=0us,{asked}".rstrip(","), **changes))


def pair(asked: str = "", **changes: Any) -> tuple[VerifyEngine, DraftEngine]:
    return VerifyEngine(runner("", **changes), 8), DraftEngine(runner(asked, **changes), 8)


class Clock:
    """Time that passes only while somebody sleeps, and a little at each look."""

    def __init__(self) -> None:
        self.now, self.slept = 50.0, 0.0

    def __call__(self) -> float:
        self.now += 1e-5
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds


def clocked(spec: PacedSpec) -> tuple[Any, Clock]:
    clock = Clock()
    plain = load_paced(spec, ModelConfig(path="paced"), 1 << 20)
    return PacedRunner(spec, plain.facts, plain.storage, clock, clock.sleep), clock


def test_parse_reads_every_field() -> None:
    asked = "paced:step=8ms,row=250us,free=16,agreement=0.2/0.95,vocab=1000,seed=7"
    spec = parse(asked)
    assert spec == PacedSpec(0.008, 0.00025, 16, (0.2, 0.95), 1000, 7)
    assert spec.seconds(1) == spec.seconds(16) == 0.008
    assert spec.seconds(20) == pytest.approx(0.009)
    assert parse("paced:step=1.5s") == PacedSpec(1.5)
    assert parse("base") is parse("/models/paced:step=1s") is parse("") is None


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("paced:", "''; must be of step, row, free"),
        ("paced:row=1ms", "step is missing"),
        ("paced:step=8", "step: got '8'; must be a time below a minute with its unit"),
        ("paced:step=-1ms", "step: got '-1ms'"),
        ("paced:step=nans", "step: got 'nans'"),
        ("paced:step=2s,step=1s", "step is given twice"),
        ("paced:step=1s,free=-1", "free: got '-1'; must be a whole number >= 0"),
        ("paced:step=1s,agreement=0.5/1.5", "agreement: got '0.5/1.5'; must be numbers in 0..1"),
        ("paced:step=1s,agreement=", "agreement: got ''"),
        ("paced:step=1s,vocab=1", "vocab: got '1'; must be a whole number in 2..16777216"),
        ("paced:step=1s,speed=9", "'speed=9'; must be of step"),
    ],
)
def test_parse_names_what_is_wrong(asked: str, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        model_path(asked)
    assert told in str(error.value)
    with pytest.raises(ConfigError):
        load_runner(ModelConfig(path=asked))


def test_paced_is_loaded_by_its_name_on_the_cpu() -> None:
    assert model_path("paced:step=1ms") == "paced:step=1ms"
    made = load_runner(ModelConfig(path="paced:step=1ms,vocab=99", max_positions=200))
    facts = made.facts
    assert (facts.runner, facts.vocab_size, facts.max_positions) == ("paced", 99, 200)
    assert facts.name == facts.kernels == "paced:step=1ms,vocab=99"
    with pytest.raises(ConfigError, match=r"device: got cuda:0; a paced model is on cpu"):
        load_runner(ModelConfig(path="paced:step=1ms", device="cuda:0"))


@pytest.mark.parametrize("agreement", ["0", "0.5", "1", "0.9/0.1"])
@pytest.mark.parametrize("k", [1, 4, 8])
def test_paced_text_is_the_bases_own_whatever_is_proposed(agreement: str, k: int) -> None:
    verify, draft = pair(f"agreement={agreement}")
    alone = speculate(verify, None, PROMPTS, 40, 0)
    drafted = speculate(verify, draft, PROMPTS, 40, k)
    assert [one.log for one in drafted] == [one.log for one in alone]
    # Texts differ with the prompt, and are no run of few tokens.
    assert len({tuple(one.written) for one in alone}) == len(PROMPTS)
    assert all(len(set(one.written)) > 20 for one in alone)


def test_paced_text_depends_on_the_last_tokens_alone_and_on_their_place() -> None:
    verify, _ = pair()
    texts = [
        one.written
        for one in speculate(verify, None, [[9, 1, 2, 3], [8, 1, 2, 3], [9, 1, 2, 4], [1, 2, 3]],
                             20, 0)
    ]  # fmt: skip
    assert texts[0] == texts[1]
    assert texts[0] != texts[2] and texts[0] != texts[3]
    other = VerifyEngine(runner("seed=1"), 8)
    assert speculate(other, None, [[9, 1, 2, 3]], 20, 0)[0].written != texts[0]


def test_paced_text_is_the_same_in_pieces_and_after_a_rollback() -> None:
    verify, draft = pair("agreement=0.6")
    whole = speculate(verify, draft, PROMPTS, 30, 3)
    pieces = speculate(verify, draft, PROMPTS, 30, 3, chunk=2)
    assert [one.log for one in pieces] == [one.log for one in whole]


def test_paced_samples_are_the_same_as_by_greedy_choice() -> None:
    verify, draft = pair("agreement=0.6")
    drawn = Decoding(temperature=1.0, seed=3, rule=COUPLED)
    greedy = speculate(verify, draft, PROMPTS, 30, 3)
    # Its logits leave nothing to chance; these rounds go the way of whole logits.
    assert [one.log for one in speculate(verify, draft, PROMPTS, 30, 3, drawn)] == [
        one.log for one in greedy
    ]


def test_paced_draft_agrees_as_often_as_it_is_told() -> None:
    verify, draft = pair("agreement=0.2/0.5/0.95")
    courses = speculate(verify, draft, [[0, 1], [1, 1], [2, 1], [4, 1]], 3000, 1)
    rates = [one.accepted / one.proposed for one in courses]
    assert rates == pytest.approx([0.2, 0.5, 0.95, 0.5], abs=0.04)
    # A right token says nothing of the next one.
    courses = speculate(verify, draft, [[1, 1]], 3000, 2)
    both = sum(length == 2 for length in courses[0].lengths) / len(courses[0].lengths)
    assert both == pytest.approx(0.25, abs=0.04)


def test_paced_forwards_take_the_time_of_their_rows() -> None:
    made, clock = clocked(PacedSpec(step=0.008, row=0.001, free=4))
    began = clock.now
    first, second = made.arena.admit(64), made.arena.admit(64)
    greedy = [Decoding(), Decoding()]
    made.forward([Span(first, 0, [1, 2, 3], 1), Span(second, 0, [1, 2, 3], 0)])
    assert clock.now - began == pytest.approx(0.010, abs=1e-4)
    began = clock.now
    made.judge([Span(first, 3, [4], 1), Span(second, 3, [4], 1)], greedy, [(), ()])
    assert clock.now - began == pytest.approx(0.008, abs=1e-4)
    began = clock.now
    # Seven rows, then two, and one of the sequence that wants a third token.
    spans = [Span(first, 4, [5] * 6, 1), Span(second, 4, [5], 1)]
    found = made.propose(spans, greedy, [2, 3])
    assert clock.now - began == pytest.approx(0.011 + 0.008 + 0.008, abs=1e-4)
    assert [len(tokens) for tokens in found] == [2, 3]
    assert (first.valid_len, second.valid_len) == (11, 7)
    # Little of it is spent watching.
    assert clock.slept > 0.9 * (0.010 + 0.008 + 0.027)


def test_paced_forward_that_is_late_waits_no_longer() -> None:
    made, clock = clocked(PacedSpec(step=0.002))
    chosen = made._chosen

    def slow(spans: Any) -> Any:
        clock.now += 0.5
        return chosen(spans)

    made._chosen = slow
    began = clock.now
    made.forward([Span(made.arena.admit(8), 0, [1], 1)])
    assert clock.now - began == pytest.approx(0.5, abs=1e-3)
    assert clock.slept == 0


def test_paced_branches_read_their_parents_tokens() -> None:
    verify, _ = pair()
    wanted = speculate(verify, None, [[7, 8, 9, 10]], 5, 0)[0].written
    session = verify.connect()
    session.open(OpenSequence(1, 1, 32, Decoding()))
    session.round([VerifyItem(1, 1, 0, (7, 8, 9), extend_only=True)])
    session.open(OpenSequence(2, 1, 32, Decoding(), parent_id=1, prefix_len=3))
    log = [7, 8, 9, 10]
    for _ in wanted:
        (verdict,) = session.round([VerifyItem(2, 1, len(log) - 1, (log[-1],))]).answers
        log.append(verdict.next_token)
    assert log[4:] == wanted
    session.release()


def test_paced_draft_takes_in_prompts_beside_proposals() -> None:
    _, draft = pair()
    session = draft.connect()
    for i in (1, 2):
        session.open(OpenSequence(i, 1, 32, Decoding()))
    result = session.round([ProposeItem(1, 1, 0, (7, 8, 9), 3), ProposeItem(2, 1, 0, (4, 5), 0)])
    assert [len(one.tokens) for one in result.answers] == [3, 0]
    assert [session.held(i).extent.valid_len for i in (1, 2)] == [5, 2]


def test_paced_chance_covers_all_tokens() -> None:
    made = runner("vocab=5,agreement=0")
    seen = set()
    for prompt in itertools.product(range(5), repeat=3):
        extent = made.arena.admit(3)
        seen.add(int(made.forward([Span(extent, 0, prompt, 1)]).argmax()))
        made.arena.free(extent)
    assert seen == set(range(5))
