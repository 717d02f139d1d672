"""Rejection on the device: its decisions, its law, and whole rounds with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from outrider.draft_service.engine import DraftEngine
from outrider.kernels import reject
from outrider.kernels.choose import gumbel, uniforms
from outrider.kernels.operation import Tools
from outrider.kernels.reject import ENTRIES, judged, reference
from outrider.shared.core.rules import COUPLED, REJECTION
from outrider.shared.core.types import Decoding, OpenSequence, SparseRow, VerifyItem
from outrider.shared.model.runner import Span
from outrider.verify_service.acceptance import JudgeItem, judge
from outrider.verify_service.engine import VerifyEngine
from outrider_testing import engines, host_device

VOCAB = 50


def sparse_rows(logits: Tensor, sizes: list[int]) -> tuple[list[SparseRow], list[int]]:
    """The likeliest entries of each row as a draft would send them, and a token drawn of each."""
    rows, tokens = [], []
    for own, size in zip(logits, sizes, strict=True):
        best = own.topk(size)
        q = best.values.softmax(-1)
        rows.append(SparseRow(tuple(best.indices.tolist()), tuple(q.tolist())))
        tokens.append(rows[-1].ids[int(q.multinomial(1))])
    return rows, tokens


def test_decides_as_the_plain_path_does() -> None:
    torch.manual_seed(11)
    items: list[JudgeItem] = []
    for number in range(1500):
        k = number % 5
        decoding = Decoding(
            temperature=[0.3, 0.7, 1.0, 1.5][number % 4],
            seed=(number * 0x9E3779B97F4A7C15) % (1 << 64),
            rule=REJECTION,
        )
        items.append(JudgeItem(decoding, [0] * (number % 90 + 1), (0,) * k))
    count = sum(len(item.proposal) + 1 for item in items)
    logits = 2 * torch.randn(count, VOCAB)
    shape = (count, VOCAB + 3)
    case: dict[str, Any] = {
        "logits": logits,
        "temperatures": torch.zeros(count),
        "seeds": torch.zeros(count, dtype=torch.int64),
        "positions": torch.zeros(count, dtype=torch.int32),
        "tokens": torch.zeros(count, dtype=torch.int32),
        "counts": torch.zeros(count, dtype=torch.int32),
        "ids": torch.zeros(shape, dtype=torch.int32),
        "offered": torch.zeros(shape),
        "count": count,
    }
    pending, proposed, first = [], [], 0
    for number, item in enumerate(items):
        d, k = item.decoding, len(item.proposal)
        draft = logits[first : first + k] / d.temperature + torch.randn(k, VOCAB)
        sizes = torch.randint(1, VOCAB + 1, (k,)).tolist()
        rows, tokens = sparse_rows(draft, sizes)
        if number % 7 == 0:
            # Found some other way: each token counts as certain.
            rows = []
        items[number] = JudgeItem(d, item.history, tuple(tokens), tuple(rows))
        own = slice(first, first + k + 1)
        case["temperatures"][own] = d.temperature
        case["seeds"][own] = d.seed - (1 << 64 if d.seed >= 1 << 63 else 0)
        case["positions"][own] = len(item.history) + torch.arange(k + 1).int()
        for i, token in enumerate(tokens):
            case["tokens"][first + i + 1] = token
            row = rows[i] if rows else SparseRow((token,), (1.0,))
            case["counts"][first + i] = size = len(row.ids)
            case["ids"][first + i, :size] = torch.tensor(row.ids)
            case["offered"][first + i, :size] = torch.tensor(row.probabilities)
        pending.append(first)
        proposed.append(k)
        first += k + 1
    clear = judged(**case)[2] > 1e-4
    verdicts = torch.zeros(len(items), 2, dtype=torch.int32)
    ranges = {"pending": torch.tensor(pending), "proposed": torch.tensor(proposed)}
    reference(**case, **ranges, verdicts=verdicts)
    expected = [[one.num_accepted, one.next_token] for one in judge(logits, items)]
    # Where two numbers are a tie but for rounding, either is right.
    sure = [bool(clear[p : p + k + 1].all()) for p, k in zip(pending, proposed, strict=True)]
    assert sum(sure) > 0.99 * len(items)
    wrong = [
        (i, want, got)
        for i, (want, got) in enumerate(zip(expected, verdicts.tolist(), strict=True))
        if sure[i] and want != got
    ]
    assert not wrong
    assert {a for a, _ in expected} == set(range(5))


# -- the law ---------------------------------------------------------------------------------

DRAWS, WORDS, OFFERED = 40_000, 4, 3


def law_p_value() -> float:
    """Of the chi-square test of three tokens' joint law: those of a round with K = 2, and what
    the base writes by itself after them."""
    generator = torch.Generator().manual_seed(5)
    base = [torch.randn(WORDS**depth, WORDS, generator=generator) for depth in range(3)]
    draft = [b + 1.5 * torch.randn(b.shape, generator=generator) for b in base]
    seeds = torch.arange(DRAWS) * 2654435761 + 17
    code = torch.zeros(DRAWS, dtype=torch.int64)
    logits, ids, offered, tokens = [], [], [], [torch.zeros_like(code)]
    for depth in range(3):
        logits.append(base[depth][code])
        best = draft[depth][code].topk(OFFERED)
        q = best.values.softmax(-1)
        positions = torch.full_like(seeds, 6 + depth)
        # The draft's stream, of the ids that it may draw.
        noise = gumbel(uniforms(seeds, positions, WORDS, torch.ones_like(seeds)))
        at = (q.log() + noise.gather(1, best.indices)).argmax(-1, keepdim=True)
        ids.append(best.indices)
        offered.append(q)
        tokens.append(best.indices.gather(1, at)[:, 0])
        code = code * WORDS + tokens[-1]
    verdicts = torch.zeros(DRAWS, 2, dtype=torch.int32)
    reference(
        logits=torch.stack(logits, 1).flatten(0, 1),
        temperatures=torch.ones(3 * DRAWS),
        seeds=seeds.repeat_interleave(3),
        positions=torch.tensor([6, 7, 8]).repeat(DRAWS),
        tokens=torch.stack(tokens[:3], 1).flatten(),
        counts=torch.tensor([OFFERED, OFFERED, 0]).repeat(DRAWS),
        ids=torch.stack(ids, 1).flatten(0, 1),
        offered=torch.stack(offered, 1).flatten(0, 1),
        pending=3 * torch.arange(DRAWS),
        proposed=torch.full((DRAWS,), 2),
        verdicts=verdicts,
        count=3 * DRAWS,
    )
    accepted, following = verdicts.long().unbind(1)
    code, law = torch.zeros_like(code), torch.ones(1, dtype=torch.float64)
    for depth in range(3):
        p = base[depth].softmax(-1)
        alone = p[code].multinomial(1, generator=generator)[:, 0]
        one = torch.where(accepted == depth, following, alone)
        one = torch.where(accepted > depth, tokens[depth + 1], one)
        code = code * WORDS + one
        law = (law[:, None] * base[depth].double().softmax(-1)).flatten()
    counts, expected = torch.bincount(code, minlength=WORDS**3), law * DRAWS
    assert float(expected.min()) > 5, "too few draws for a chi-square test"
    return float(stats.chisquare(counts.double().numpy(), expected.numpy()).pvalue)


def test_has_the_law_of_the_base() -> None:
    assert law_p_value() > 1e-3


def not_renormalised(p: Tensor, q: Tensor) -> Tensor:
    """What the positive part lacks of 1 goes to the last token."""
    weights = (p - q).clamp(min=0)
    weights[:, -1] += 1 - weights.sum(-1)
    return weights


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("residual", not_renormalised),
        ("residual", lambda p, q: p),
        ("RESIDUAL", 1),  # the draft's own stream: noise shared between proposal and residual
    ],
    ids=["residual not renormalised", "residual is the base", "noise shared"],
)
def test_a_wrong_rule_has_another_law(monkeypatch: Any, name: str, value: Any) -> None:
    monkeypatch.setattr(reject, name, value)
    assert law_p_value() < 1e-6


def test_verdict_of_a_sequence_does_not_depend_on_its_batch(emulated: Any) -> None:
    torch.manual_seed(2)
    cpu = torch.device("cpu")
    case = list(reject.OPERATION.cases(cpu, torch.float16))[2]
    run = reject.OPERATION.implementations[0].build(Tools(cpu, emulated(90)))
    run(**case)
    together = case["verdicts"][1:].clone()
    alone = dict(case, verdicts=torch.zeros(1, 2, dtype=torch.int32))
    for name in ("pending", "proposed"):
        alone[name] = case[name][1:]
    alone["counts"] = case["counts"].clone()
    alone["counts"][: int(alone["pending"][0])] = -1
    run(**alone)
    assert torch.equal(alone["verdicts"], together)


# -- rounds ----------------------------------------------------------------------------------

DRAWN = Decoding(temperature=0.9, seed=7, rule=REJECTION)
MIXED = [
    DRAWN,
    Decoding(),
    Decoding(temperature=0.8, seed=1 << 63, rule=COUPLED),
    Decoding(temperature=1.3, seed=(1 << 64) - 5, rule=REJECTION),
    Decoding(rule=REJECTION),
]


@pytest.fixture(scope="module")
def base() -> Any:
    return host_device.hosted(engines.runner(engines.tiny_llama(3, hidden=256), runner="llama"), 4)


@pytest.fixture(scope="module")
def draft() -> Any:
    made = engines.runner(engines.tiny_llama(3, hidden=256), runner="llama")
    # A draft that resembles the base: some proposals stand, some do not.
    with torch.no_grad():
        for weight in made._model.parameters():
            weight.add_(0.03 * torch.randn(weight.shape, generator=torch.manual_seed(1)))
    return DraftEngine(made, 4)


@pytest.fixture
def asked(base: Any) -> Iterator[Callable[[], list[bool]]]:
    """Whether each round so far was judged on the device."""
    original, seen = base.judge, []

    def watched(*arguments: Any) -> Any:
        found = original(*arguments)
        seen.append(found is not None)
        return found

    base.judge = watched
    yield lambda: seen
    del base.judge


def on_the_host(base: Any, run: Callable[[], Any]) -> Any:
    """What ``run`` gives where the device judges nothing."""
    watched = base.judge
    base.judge = lambda *arguments: None
    try:
        return run()
    finally:
        base.judge = watched


@pytest.mark.parametrize("ks", [0, 1, 2, 3, 4, [3, 0, 4, 1, 2]], ids=str)
@pytest.mark.parametrize("decoding", [DRAWN, MIXED], ids=["rejection", "mixed"])
def test_rounds_write_what_the_plain_path_writes(
    base: Any, draft: Any, asked: Any, ks: Any, decoding: Any
) -> None:
    verify = VerifyEngine(base, 4)
    prompts = engines.prompts(5, seed=4, longest=8)

    def run() -> Any:
        return engines.speculate(verify, draft, prompts, 12, ks, decoding)

    found = run()
    assert asked() and all(asked())
    expected = on_the_host(base, run)
    assert [c.log for c in found] == [c.log for c in expected]
    assert [c.lengths for c in found] == [c.lengths for c in expected]
    if ks == 4:
        assert 0 < found[0].accepted < found[0].proposed


def test_distributions_that_the_buffer_has_no_room_for_go_the_plain_way(
    base: Any, draft: Any, asked: Any
) -> None:
    wide = Decoding(temperature=0.9, seed=7, rule=REJECTION, draft_top=ENTRIES + 1)
    verify = VerifyEngine(base, 4)
    engines.speculate(verify, draft, [[1, 2, 3]], 4, 2, wide)
    assert False in asked()
    assert base.arena.used == 0


def test_a_proposal_without_distributions_counts_as_certain(base: Any) -> None:
    extent = base.arena.admit(16)
    found = {}
    for rows in (None, [()], [(SparseRow((9,), (1.0,)), SparseRow((8,), (1.0,)))]):
        span = Span(extent, 0, [3, 9, 8], 3)
        found[str(rows)] = base.judge([span], [DRAWN], [[9, 8]], rows)
        base.arena.rollback(extent, 0)
    base.arena.free(extent)
    assert len({str(one) for one in found.values()}) == 1 and None not in found.values()


def test_a_row_that_is_not_finite_is_refused() -> None:
    runner = host_device.hosted(
        engines.runner(engines.tiny_llama(3, hidden=256), runner="llama"), 4
    )
    runner._embedding.data[9] = math.nan
    session = VerifyEngine(runner, 4).connect()
    session.open(OpenSequence(1, 0, 16, DRAWN))
    result = session.round([VerifyItem(1, 0, 0, (3, 9), (4,))])
    assert [refusal.code for refusal in result.refusals] == [6]
