"""Samples of one prompt: the prompt is forwarded once, and each goes on as if it owned it."""

from __future__ import annotations

from typing import Any

import pytest

from outrider.draft_service.engine import DraftEngine
from outrider.shared.core.errors import RefusalCode, SequenceRefused
from outrider.shared.core.rules import COUPLED
from outrider.shared.core.types import Decoding, OpenSequence, ProposeItem, VerifyItem
from outrider.verify_service.engine import VerifyEngine
from outrider_testing import engines

PROMPT = tuple((5 * i + 1) % 97 for i in range(21))
PREFIX = len(PROMPT) - 1
CAPACITY = 48


def decoding(seed: int) -> Decoding:
    return Decoding(
        temperature=0.9,
        rule=COUPLED,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        prompt_len=len(PROMPT),
        seed=seed,
    )


@pytest.fixture(params=["llama", "generic", "gpt2", "windowed", "copied"])
def engine(request: pytest.FixtureRequest) -> VerifyEngine:
    """Each way to share: a branch, or, for rings and kernels that can't read one, a copy."""
    kind = request.param
    if kind == "windowed":
        runner = engines.runner(engines.tiny_gemma2(1), prefill_chunk=6, max_k=4)
    elif kind == "gpt2":
        runner = engines.runner(engines.tiny_gpt2(1))
    else:
        runner = engines.runner(
            engines.tiny_llama(1), runner="generic" if kind == "generic" else "auto"
        )
    if kind == "copied":
        runner.reads_branches = False
    return VerifyEngine(runner, 4)


def plain(session: Any, number: int, log: list[int], count: int) -> list[int]:
    """``count`` more tokens, one at a time; ``log`` is extended."""
    for _ in range(count):
        (answer,) = session.round([VerifyItem(number, 1, len(log) - 1, (log[-1],))]).answers
        log.append(answer.next_token)
    return log[len(PROMPT) :]


def alone(engine: VerifyEngine, seed: int, count: int) -> list[int]:
    session = engine.connect()
    session.open(OpenSequence(1, 1, CAPACITY, decoding(seed)))
    log = [*PROMPT]
    assert session.round([VerifyItem(1, 1, 0, PROMPT[:PREFIX], extend_only=True)]).answers
    made = plain(session, 1, log, count)
    session.release()
    return made


def test_samples_share_one_prefill_and_write_what_each_would_alone(engine: VerifyEngine) -> None:
    seeds = (3, 4, 5)
    wanted = [alone(engine, seed, 20) for seed in seeds]
    session = engine.connect()
    session.open(OpenSequence(1, 1, CAPACITY, decoding(seeds[0])))
    taken = session.round([VerifyItem(1, 1, 0, PROMPT[:PREFIX], extend_only=True)])
    assert taken.rows == PREFIX
    for number in (2, 3):
        session.open(OpenSequence(number, 1, CAPACITY, decoding(seeds[number - 1]), 1, PREFIX))
    logs = {number: [*PROMPT] for number in (1, 2, 3)}
    first = session.round([VerifyItem(n, 1, PREFIX, PROMPT[PREFIX:]) for n in logs])
    assert (first.rows, first.refusals) == (3, [])
    for answer in first.answers:
        logs[answer.sequence_id].append(answer.next_token)
    # One after the other, with proposals that are wrong: what one rejects disturbs no other.
    for number, log in logs.items():
        while len(log) < len(PROMPT) + 19:
            junk = ((log[-1] + 1) % 97, 7)
            item = VerifyItem(number, 1, len(log) - 1, (log[-1],), junk)
            (answer,) = session.round([item]).answers
            log += [*junk[: answer.num_accepted], answer.next_token]
        if number == 1:
            session.close(1)  # the shared prompt outlives the sample that took it in
    for number, log in logs.items():
        assert log[len(PROMPT) :][:19] == wanted[number - 1][:19]
    session.release()
    assert (engine.info().sequences, engine.info().arena_tokens_used) == (0, 0)


def test_sharing_reserves_the_prompt_once() -> None:
    engine = VerifyEngine(engines.runner(engines.tiny_llama(1)), 4)
    session = engine.connect()
    session.open(OpenSequence(1, 1, CAPACITY, decoding(1)))
    session.round([VerifyItem(1, 1, 0, PROMPT)])
    session.open(OpenSequence(2, 1, CAPACITY, decoding(2), 1, PREFIX))
    assert engine.info().arena_tokens_used == 2 * CAPACITY - PREFIX
    session.close(1)
    assert engine.info().arena_tokens_used == 2 * CAPACITY - PREFIX
    session.close(2)
    assert engine.info().arena_tokens_used == 0


@pytest.mark.parametrize(
    ("parent", "prefix"), [(9, PREFIX), (1, PREFIX + 2), (1, 0), (1, CAPACITY), (2, 5)]
)
def test_what_can_not_be_shared_is_asked_for_again(parent: int, prefix: int) -> None:
    engine = VerifyEngine(engines.runner(engines.tiny_llama(1)), 4)
    session = engine.connect()
    session.open(OpenSequence(1, 1, CAPACITY, decoding(1)))
    (whole,) = session.round([VerifyItem(1, 1, 0, PROMPT)]).answers
    session.open(OpenSequence(2, 1, CAPACITY, decoding(1), 1, PREFIX))
    session.open(OpenSequence(3, 1, CAPACITY, decoding(1), parent, prefix))
    if prefix:
        missing = session.round([VerifyItem(3, 1, prefix, (1,))])
        assert [RefusalCode(one.code) for one in missing.refusals] in (
            [RefusalCode.KV_MISSING],
            [RefusalCode.INVALID],
        )
        assert missing.refusals[0].held_len == 0
    (answer,) = session.round([VerifyItem(3, 1, 0, PROMPT)]).answers
    assert answer.next_token == whole.next_token
    session.release()
    assert engine.info().arena_tokens_used == 0


def test_a_branch_without_room_is_refused_and_leaves_its_parent_alone() -> None:
    engine = VerifyEngine(engines.runner(engines.tiny_llama(1), arena_bytes=1 << 16), 4)
    session = engine.connect()
    session.open(OpenSequence(1, 1, CAPACITY, decoding(1)))
    (whole,) = session.round([VerifyItem(1, 1, 0, PROMPT)]).answers
    with pytest.raises(SequenceRefused) as error:
        session.open(OpenSequence(2, 1, 1 << 20, decoding(2), 1, PREFIX))
    assert error.value.code == RefusalCode.NO_CAPACITY
    (again,) = session.round([VerifyItem(1, 1, 0, PROMPT)]).answers
    assert again == whole
    session.release()
    assert engine.info().arena_tokens_used == 0


def test_a_draft_shares_the_prompt_too() -> None:
    engine = DraftEngine(engines.runner(engines.tiny_llama(2, layers=1)), 4)
    session = engine.connect()
    session.open(OpenSequence(1, 1, CAPACITY, decoding(1)))
    (whole,) = session.round([ProposeItem(1, 1, 0, PROMPT, 4)]).answers
    session.open(OpenSequence(2, 1, CAPACITY, decoding(1), 1, PREFIX))
    result = session.round([ProposeItem(2, 1, PREFIX, PROMPT[PREFIX:], 4)])
    assert (result.rows, result.answers[0].tokens) == (4, whole.tokens)
    session.release()
    assert engine.info().arena_tokens_used == 0
