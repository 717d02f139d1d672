"""What of a proposal is judged, whatever a draft says."""

from __future__ import annotations

import math

import pytest
import torch

from outrider.shared.core.rules import COUPLED, GREEDY, REJECTION, RULES, Rule
from outrider.shared.core.types import Decoding, OpenSequence, SparseRow, VerifyItem
from outrider.verify_service.engine import VerifyEngine
from outrider.verify_service.soundness import sound_tokens
from outrider_testing import engines

VOCAB = 50
GOOD = SparseRow((1, 2), (0.5, 0.5))


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (SparseRow((1, 2), (1.0,)), "one probability"),
        (SparseRow((1, 1), (0.5, 0.5)), "distinct"),
        (SparseRow((1, VOCAB), (0.5, 0.5)), "ids must be in"),
        (SparseRow((1, 2), (1.5, -0.5)), "in [0, 1]"),
        (SparseRow((1, 2), (math.nan, 0.5)), "in [0, 1]"),
        (SparseRow((1, 2), (0.5, 0.4)), "sum to 1"),
        (SparseRow((2,), (1.0,)), "probability 0"),
        (SparseRow((1, 2), (0.0, 1.0)), "probability 0"),
    ],
)
def test_sound_tokens_end_at_a_row_that_can_not_be_judged(row: SparseRow, why: str) -> None:
    kept, told = sound_tokens((1, 1, 1), (GOOD, row, GOOD), VOCAB, 9)
    assert kept == 1
    assert why in told


def test_sound_tokens_end_at_unknown_ids_and_where_room_ends() -> None:
    assert sound_tokens((1, 2, VOCAB, 3), (), VOCAB, 9)[0] == 2
    assert sound_tokens((-1, 2), (), VOCAB, 9)[0] == 0
    assert sound_tokens((1, 2, 3), (), VOCAB, 2)[0] == 2
    assert sound_tokens((1, 2), (GOOD,), VOCAB, 9)[0] == 0


def test_sound_tokens_are_all_of_what_is_well_formed() -> None:
    assert sound_tokens((1, 2), (GOOD, GOOD), VOCAB, 2) == (2, "")
    assert sound_tokens((3, 4), (), VOCAB, 2) == (2, "")
    assert sound_tokens((), (), VOCAB, 0) == (0, "")


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_verify_takes_a_broken_proposal_for_a_shorter_one(rule: Rule) -> None:
    """Whatever is wrong, the verdict is that on the part before it."""
    engine = VerifyEngine(engines.runner(engines.tiny_llama(1)), 4)
    decoding = Decoding(temperature=1.0 if rule.samples else 0.0, seed=3, rule=rule)
    rows = (SparseRow((4,), (1.0,)), SparseRow((5,), (1.0,))) if rule is REJECTION else ()
    verdicts = []
    for proposal, said in (
        ((4,), rows[:1]),
        ((4, 97), (*rows[:1], SparseRow((97,), (1.0,))) if rows else ()),
        ((4, 1 << 31), (*rows[:1], SparseRow((5,), (math.nan,))) if rows else ()),
    ):
        session = engine.connect()
        session.open(OpenSequence(1, 1, 40, decoding))
        result = session.round([VerifyItem(1, 1, 0, (1, 2, 3), proposal, said)])
        verdicts += result.answers
        assert result.cut == len(proposal) - 1
        session.release()
    assert verdicts[1:] == verdicts[:1] * 2


@pytest.mark.parametrize("rule", [GREEDY, COUPLED])
def test_verify_takes_no_more_than_it_has_places_for(rule: Rule) -> None:
    engine = VerifyEngine(engines.runner(engines.tiny_llama(1)), 4)
    places = engine.runner.facts.max_positions
    session = engine.connect()
    session.open(OpenSequence(1, 1, places + 9, Decoding(rule=rule)))
    torch.manual_seed(0)
    log = tuple(torch.randint(97, (places - 2,)).tolist())
    session.round([VerifyItem(1, 1, 0, log[:-1], extend_only=True)])
    result = session.round([VerifyItem(1, 1, len(log) - 1, log[-1:], (1, 2, 3, 4))])
    assert not result.refusals
    session = engine.connect()
    session.open(OpenSequence(1, 1, 64, Decoding(rule=rule)))
    assert not session.round([VerifyItem(1, 1, 0, (1, 2, 3), tuple(range(9)))]).refusals
