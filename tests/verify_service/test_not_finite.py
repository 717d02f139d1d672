"""Logits that are not finite: the text ends where it ends without proposals, whatever those are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from outrider.draft_service.engine import DraftEngine
from outrider.shared.core.errors import RefusalCode
from outrider.shared.core.rules import COUPLED, GREEDY, REJECTION, Rule
from outrider.shared.core.types import Decoding, OpenSequence, ProposeItem, SparseRow, VerifyItem
from outrider.shared.model.runner import Span
from outrider.verify_service.engine import VerifyEngine
from outrider_testing import engines, host_device
from outrider_testing.architectures import tiny

PROMPT = (5, 6, 7)
COUNT = 40
KINDS = ["llama", "cpu", "generic", "window", "cuda", "head"]
Proposer = Callable[[int, list[int]], tuple[int, ...]]


class Headless:
    """A runner without finite logits for the rows of one token."""

    def __init__(self, runner: Any, token: int | None) -> None:
        self._runner, self._token = runner, token

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def judge(self, *_: Any) -> None:
        """Everything goes by its logits."""

    def forward(self, spans: Any) -> torch.Tensor:
        logits = self._runner.forward(spans).clone()
        read = [token for span in spans for token in span.tokens[len(span.tokens) - span.wanted :]]
        logits[[token == self._token for token in read]] = float("inf")
        return logits  # type: ignore[no-any-return]


def base(kind: str, broken: int | None = None) -> VerifyEngine:
    """A base; where the token ``broken`` is read, no number of any layer is finite, or with the
    kind "head" no logit alone, which leaves the rows beside it as they are."""
    model: Any
    if kind == "window":
        model = tiny("mistral", {"vocab_size": engines.VOCAB, "sliding_window": 8})
    elif kind == "cuda":
        model = engines.tiny_llama(1, head_dim=64, hidden=128, num_attention_heads=2)
    else:
        model = engines.tiny_llama(1)
    options: dict[str, dict[str, Any]] = {
        "generic": {"runner": "generic"}, "window": {"prefill_chunk": 8},
        "llama": {"runner": "llama"}, "cuda": {"runner": "llama"},
    }  # fmt: skip
    made: Any = engines.runner(model, **options.get(kind, {}))
    if kind == "head":
        made = Headless(made, broken)
    elif broken is not None:
        model.get_input_embeddings().weight.data[broken] = float("nan")
    return VerifyEngine(host_device.hosted(made, 5) if kind == "cuda" else made, 5)


def written(verify: VerifyEngine, decoding: Decoding, k: int, propose: Proposer) -> list[int]:
    """The log up to the refusal, or after enough tokens."""
    session = verify.connect()
    session.open(OpenSequence(1, 1, 120, decoding))
    log = list(PROMPT)
    while len(log) < COUNT:
        proposal = propose(k, log) if k else ()
        at = len(log) - 1 if len(log) > len(PROMPT) else 0
        result = session.round([VerifyItem(1, 1, at, tuple(log[at:]), proposal)])
        if result.refusals:
            assert result.refusals[0].code == RefusalCode.MODEL
            break
        (verdict,) = result.answers
        log += [*proposal[: verdict.num_accepted], verdict.next_token]
        assert verdict.committed_len == len(log)
    session.release()
    return log


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", [GREEDY, COUPLED])
def test_verify_ends_at_the_same_token_whatever_was_proposed(kind: str, rule: Rule) -> None:
    decoding = Decoding(1.0 if rule.samples else 0.0, seed=4, rule=rule, prompt_len=3)
    whole = written(base(kind), decoding, 0, lambda k, log: ())
    broken = next(token for at, token in enumerate(whole) if at >= 10 and token not in whole[:at])
    verify = base(kind, broken)
    alone = written(verify, decoding, 0, lambda k, log: ())
    assert alone == whole[: whole.index(broken) + 1]
    draft = DraftEngine(engines.runner(engines.tiny_llama(1)), 5)

    def right(k: int, log: list[int]) -> tuple[int, ...]:
        """The base's own next tokens, also beyond the place where it ends."""
        return tuple(whole[len(log) :][:k])

    def drafted(k: int, log: list[int]) -> tuple[int, ...]:
        session = draft.connect()
        session.open(OpenSequence(1, 1, 120, decoding))
        offer = session.round([ProposeItem(1, 1, 0, tuple(log), k)]).answers[0]
        session.release()
        return offer.tokens

    def bad(k: int, log: list[int]) -> tuple[int, ...]:
        """Some right tokens, and then only the one that breaks the base."""
        return (*whole[len(log) :][: len(log) % k], *[broken] * k)[:k]

    for k in (1, 2, 5):
        for propose in (right, drafted, bad):
            assert written(verify, decoding, k, propose) == alone, (k, propose)


@pytest.mark.parametrize("kind", KINDS)
def test_rejection_judges_a_token_whose_row_is_not_finite_by_the_row_before(kind: str) -> None:
    sound = base(kind)
    extent = sound.runner.arena.admit(8)
    with torch.inference_mode():
        logits = sound.runner.forward([Span(extent, 0, PROMPT, 1)])[0].float()
    broken = int(logits.argmax())
    # So that it is proposed about twice as often as the base has it.
    heat = 8.0 if kind == "cuda" else 1.0
    p = float((logits / heat).softmax(-1)[broken])
    rows = (SparseRow((broken, 8), (min(2 * p, 0.9), 1 - min(2 * p, 0.9))),)
    verify = base(kind, broken)
    stood = 0
    for seed in range(24):
        told = []
        for engine in (verify, sound):
            session = engine.connect()
            decoding = Decoding(heat, seed=seed, rule=REJECTION, prompt_len=3)
            session.open(OpenSequence(1, 1, 40, decoding))
            result = session.round([VerifyItem(1, 1, 0, PROMPT, (broken,), rows)])
            (verdict,) = result.answers
            told.append((verdict.num_accepted, verdict.next_token))
            session.release()
        stood += told[1][0]
        assert told[0] == ((0, broken) if told[1][0] else told[1])
    assert 0 < stood < 24


def test_verdict_of_the_device_steps_back_before_a_row_that_is_not_finite() -> None:
    session = base("llama").connect()
    session.open(OpenSequence(1, 1, 40, Decoding()))
    session.round([VerifyItem(1, 1, 0, PROMPT[:-1], extend_only=True)])
    item = VerifyItem(1, 1, 2, PROMPT[2:], (10, 11, 12))
    (verdict,) = session.settle([item], [(2, -1)]).answers
    assert (verdict.num_accepted, verdict.next_token, verdict.committed_len) == (1, 11, 5)
    assert session.held(1).extent.valid_len == 4
    assert session.held(1).log == [*PROMPT, 10, 11]


def test_verify_judges_anew_what_came_in_more_rows_than_a_ring_takes_at_a_time() -> None:
    verify, broken = base("window", 50), tuple([50] * 4)
    log = tuple(range(1, 40))
    told = []
    for proposal in ((), broken):
        session = verify.connect()
        session.open(OpenSequence(1, 1, 80, Decoding()))
        session.round([VerifyItem(1, 1, 0, log[:4], extend_only=True)])
        assert len(log) - 4 > verify.runner.arena.max_rows
        result = session.round([VerifyItem(1, 1, 4, log[4:], proposal)])
        told.append([(one.num_accepted, one.next_token) for one in result.answers])
        session.release()
    assert len(told[0]) == 1
    assert told[1] == told[0]
