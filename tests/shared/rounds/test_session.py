"""Sessions over real engines: the pointer contract, message by message."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from outrider.draft_service.engine import DraftEngine
from outrider.shared.core.errors import RefusalCode, SequenceRefused
from outrider.shared.core.rules import COUPLED, REJECTION, Rule
from outrider.shared.core.types import Decoding, OpenSequence, ProposeItem, VerifyItem
from outrider.verify_service.engine import VerifyEngine
from outrider_testing import engines

GREEDY = Decoding()
PROMPT = (5, 6, 7, 8)


@pytest.fixture
def verify() -> VerifyEngine:
    return VerifyEngine(engines.runner(engines.tiny_llama(1), arena_bytes=1 << 18), 8)


@pytest.fixture
def draft() -> DraftEngine:
    return DraftEngine(engines.runner(engines.tiny_llama(2, layers=1)), 8)


def opened(engine: Any, capacity: int = 64, epoch: int = 1) -> Any:
    session = engine.connect()
    session.open(OpenSequence(1, epoch, capacity, GREEDY))
    return session


def refused(result: Any) -> tuple[RefusalCode, int]:
    assert not result.answers
    (one,) = result.refusals
    return RefusalCode(one.code), one.held_len


def test_open_is_idempotent_and_a_higher_epoch_replaces(verify: VerifyEngine) -> None:
    session = opened(verify)
    session.open(OpenSequence(1, 1, 64, GREEDY))
    assert (verify.info().sequences, verify.info().arena_tokens_used) == (1, 64)
    session.open(OpenSequence(1, 3, 32, GREEDY))
    assert (verify.info().sequences, verify.info().arena_tokens_used) == (1, 32)
    with pytest.raises(SequenceRefused) as error:
        session.open(OpenSequence(1, 2, 32, GREEDY))
    assert error.value.code == RefusalCode.STALE_EPOCH
    session.close(1)
    session.close(1)
    assert (verify.info().sequences, verify.info().arena_tokens_used) == (0, 0)


def test_exhaustion_refuses_and_leaves_the_others_alone(verify: VerifyEngine) -> None:
    total = verify.info().arena_tokens
    session = opened(verify, total - 10)
    with pytest.raises(SequenceRefused, match="11 token slots") as error:
        session.open(OpenSequence(2, 1, 11, GREEDY))
    assert error.value.code == RefusalCode.NO_CAPACITY
    session.open(OpenSequence(3, 1, 10, GREEDY))
    assert verify.info().arena_tokens_largest_free == 0
    assert session.round([VerifyItem(1, 1, 0, PROMPT)]).answers
    session.release()
    assert verify.info().arena_tokens_largest_free == total
    with pytest.raises(SequenceRefused):
        session.open(OpenSequence(4, 1, 10, GREEDY))


def test_streams_do_not_see_each_other(verify: VerifyEngine) -> None:
    one, two = opened(verify), opened(verify)
    one.round([VerifyItem(1, 1, 0, PROMPT)])
    assert refused(two.round([VerifyItem(1, 1, 4, (9,))])) == (RefusalCode.KV_MISSING, 0)
    one.release()
    assert two.round([VerifyItem(1, 1, 0, PROMPT)]).answers


def test_each_broken_item_has_its_code_and_the_good_one_is_served(verify: VerifyEngine) -> None:
    session = opened(verify)
    session.open(OpenSequence(2, 5, 64, GREEDY))
    (good,) = session.round([VerifyItem(1, 1, 0, PROMPT)]).answers
    bad = [
        (VerifyItem(9, 1, 0, PROMPT), RefusalCode.UNKNOWN),
        (VerifyItem(2, 6, 0, PROMPT), RefusalCode.UNKNOWN),
        (VerifyItem(2, 4, 0, PROMPT), RefusalCode.STALE_EPOCH),
        (VerifyItem(2, 5, 1, PROMPT), RefusalCode.KV_MISSING),
        (VerifyItem(2, 5, 0, ()), RefusalCode.INVALID),
        (VerifyItem(2, 5, 0, (97,)), RefusalCode.INVALID),
        (VerifyItem(2, 5, 0, (-1,)), RefusalCode.INVALID),
        (VerifyItem(2, 5, 0, (1,), (2,), extend_only=True), RefusalCode.INVALID),
        (VerifyItem(2, 5, 0, (1,) * 65), RefusalCode.INVALID),
    ]
    for item, code in bad:
        result = session.round([item, VerifyItem(1, 1, 0, PROMPT)])
        assert [RefusalCode(r.code) for r in result.refusals] == [code], item
        assert result.answers == [good]
    twice = session.round([VerifyItem(1, 1, 0, PROMPT), VerifyItem(1, 1, 0, PROMPT)])
    assert twice.answers == [good]
    assert RefusalCode(twice.refusals[0].code) == RefusalCode.INVALID


def test_a_verify_message_sent_again_has_the_same_effect(verify: VerifyEngine) -> None:
    session = opened(verify)
    (first,) = session.round([VerifyItem(1, 1, 0, PROMPT)]).answers
    item = VerifyItem(1, 1, 4, (first.next_token,), (1, 2, 3))
    (once,) = session.round([item]).answers
    (again,) = session.round([item]).answers
    assert once == again
    log = (*PROMPT, first.next_token, *(1, 2, 3)[: once.num_accepted], once.next_token)
    assert once.committed_len == len(log)
    (then,) = session.round([VerifyItem(1, 1, len(log) - 1, log[-1:])]).answers
    (fresh,) = session.round([VerifyItem(1, 1, 0, log)]).answers
    assert then == fresh


def test_a_draft_message_sent_again_has_the_same_effect(draft: DraftEngine) -> None:
    session = opened(draft)
    item = ProposeItem(1, 1, 0, PROMPT, 4)
    (once,) = session.round([item]).answers
    (again,) = session.round([item]).answers
    assert once == again
    assert (once.committed_len, len(once.tokens)) == (4, 4)
    # After full acceptance the KV of the last proposed token is missing: two rows.
    after = (once.tokens[3], 9)
    assert refused(session.round([ProposeItem(1, 1, 8, (9,), 2)])) == (RefusalCode.KV_MISSING, 7)
    result = session.round([ProposeItem(1, 1, 7, after, 2)])
    assert result.rows == 3
    (fresh,) = session.round([ProposeItem(1, 1, 0, PROMPT + once.tokens + (9,), 2)]).answers
    assert result.answers == [fresh]


def test_prefill_in_chunks_equals_prefill_at_once(verify: VerifyEngine, draft: DraftEngine) -> None:
    prompt = tuple(range(30))
    session = opened(verify)
    (whole,) = session.round([VerifyItem(1, 1, 0, prompt)]).answers
    (chunk,) = session.round([VerifyItem(1, 1, 0, prompt[:20], extend_only=True)]).answers
    assert (chunk.next_token, chunk.committed_len) == (None, 20)
    (rest,) = session.round([VerifyItem(1, 1, 20, prompt[20:])]).answers
    assert rest == whole
    helper = opened(draft)
    (whole_proposal,) = helper.round([ProposeItem(1, 1, 0, prompt, 3)]).answers
    (empty,) = helper.round([ProposeItem(1, 1, 0, prompt, 0)]).answers
    assert (empty.tokens, empty.committed_len) == ((), 30)
    (proposal,) = helper.round([ProposeItem(1, 1, 29, prompt[29:], 3)]).answers
    assert proposal == whole_proposal


def test_logits_that_are_not_finite_refuse_only_their_sequence() -> None:
    model = engines.tiny_llama(1)
    with torch.no_grad():
        model.model.embed_tokens.weight[13] = float("nan")
    verify = VerifyEngine(engines.runner(model), 8)
    session = opened(verify)
    session.open(OpenSequence(2, 1, 64, GREEDY))
    result = session.round([VerifyItem(1, 1, 0, (5, 13)), VerifyItem(2, 1, 0, PROMPT)])
    assert [(r.sequence_id, RefusalCode(r.code)) for r in result.refusals] == [
        (1, RefusalCode.MODEL)
    ]
    assert [a.sequence_id for a in result.answers] == [2]
    (alone,) = session.round([VerifyItem(1, 1, 0, (5, 6))]).answers
    assert alone.next_token is not None
    drafting = opened(DraftEngine(verify.runner, 8))
    assert refused(drafting.round([ProposeItem(1, 1, 0, (5, 13), 2)]))[0] == RefusalCode.MODEL
    assert drafting.round([ProposeItem(1, 1, 0, PROMPT, 2)]).answers


@pytest.mark.parametrize("rule", [COUPLED, REJECTION])
def test_sampling_needs_no_more_than_the_seed(
    verify: VerifyEngine, draft: DraftEngine, rule: Rule
) -> None:
    decoding = Decoding(temperature=0.9, top_p=0.95, seed=11, rule=rule)
    asked = engines.prompts(3, seed=5)
    written = [
        [c.written for c in engines.speculate(verify, draft, asked, 12, k, decoding)]
        for k in ((0, 2, 5) if rule == COUPLED else (5, 5))
    ]
    assert written[0] == written[1] == written[-1]
    other = Decoding(temperature=0.9, top_p=0.95, seed=12, rule=rule)
    assert [c.written for c in engines.speculate(verify, draft, asked, 12, 5, other)] != written[0]


def test_what_samples_share_is_not_written_again(verify: VerifyEngine) -> None:
    """A parent whose message comes twice leaves the KV that its branches read alone."""
    session = opened(verify)
    prompt = tuple(range(1, 11))
    (first,) = session.round([VerifyItem(1, 1, 0, prompt)]).answers
    session.open(OpenSequence(2, 1, 40, GREEDY, parent_id=1, prefix_len=9))
    again = session.round([VerifyItem(1, 1, 0, prompt)])
    assert refused(again) == (RefusalCode.KV_MISSING, 10)
    (child,) = session.round([VerifyItem(2, 1, 9, prompt[9:])]).answers
    assert child.next_token == first.next_token
    session.close(2)
    assert session.round([VerifyItem(1, 1, 0, prompt)]).answers == [first]


def books(session: Any) -> tuple[list[int], int, int]:
    """What is kept of sequence 1: its log, and the positions that are valid and were written."""
    held = session.held(1)
    return held.log, held.extent.valid_len, held.extent.high


@pytest.mark.parametrize("proposal", [(), (1, 2, 3)])
def test_settled_verdicts_leave_the_books_of_those_that_were_judged(
    verify: VerifyEngine, proposal: tuple[int, ...]
) -> None:
    judged, settled = opened(verify), opened(verify)
    for session in (judged, settled):
        session.round([VerifyItem(1, 1, 0, PROMPT[:-1], extend_only=True)])
    item = VerifyItem(1, 1, 3, PROMPT[3:], proposal)
    wanted = judged.round([item])
    (verdict,) = wanted.answers
    found = settled.settle([item], [(verdict.num_accepted, verdict.next_token)])
    assert (found.answers, found.rows, found.refusals) == (wanted.answers, wanted.rows, [])
    assert books(settled) == books(judged)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("pending", [1, 2])
def test_settled_proposals_leave_the_books_of_those_that_were_made(
    draft: DraftEngine, k: int, pending: int
) -> None:
    made, settled = opened(draft), opened(draft)
    held = len(PROMPT) - pending
    for session in (made, settled):
        session.round([ProposeItem(1, 1, 0, PROMPT[:held], 0)])
    item = ProposeItem(1, 1, held, PROMPT[held:], k)
    wanted = made.round([item])
    found = settled.settle([item], [list(wanted.answers[0].tokens)])
    assert (found.answers, found.rows, found.refusals) == (wanted.answers, wanted.rows, [])
    assert books(settled) == books(made)


def test_settle_refuses_what_a_round_refuses(verify: VerifyEngine, draft: DraftEngine) -> None:
    session = opened(verify)
    session.round([VerifyItem(1, 1, 0, PROMPT[:-1], extend_only=True)])
    session.open(OpenSequence(2, 1, 64, GREEDY))
    items = [VerifyItem(2, 1, 3, PROMPT[3:]), VerifyItem(1, 1, 3, PROMPT[3:])]
    result = session.settle(items, [(0, 7), (0, 9)])
    assert [(one.sequence_id, one.held_len) for one in result.refusals] == [(2, 0)]
    # What the other one is told is its own.
    assert [(one.sequence_id, one.next_token) for one in result.answers] == [(1, 9)]
    # Logits that were not finite: nothing of that round is kept.
    broken = session.settle([VerifyItem(1, 1, 4, (9,), (1,))], [(0, -1)])
    assert refused(broken)[0] == RefusalCode.MODEL
    assert session.held(1).extent.valid_len == 4
    drafting = opened(draft)
    drafting.round([ProposeItem(1, 1, 0, PROMPT[:-1], 0)])
    broken = drafting.settle([ProposeItem(1, 1, 3, PROMPT[3:], 2)], [[4, -1]])
    assert refused(broken)[0] == RefusalCode.MODEL
    assert drafting.held(1).extent.valid_len == 3
