"""The verdicts: against plain decoding, and against the rules written in plain Python."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import random

import pytest
import torch

from outrider.shared.core.rules import COUPLED, GREEDY, REJECTION, RULES
from outrider.shared.core.types import Decoding, SparseRow
from outrider.shared.sampling.choose import RowContext, process, propose
from outrider.shared.sampling.noise import Stream, gumbel, seed_tensor, uniform
from outrider.verify_service.acceptance import Judged, JudgeItem, judge
from outrider.verify_service.rules.comparing import accepted_prefix

VOCAB = 32
PARAMETERS = {
    "nothing": {},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.1},
    "repetition": {"repetition_penalty": 1.8},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 1.0},
    "bias": {"logit_bias": ((5, 4.0), (0, -9.0))},
    "bad_words": {"bad_words": ((9,), (1, 2), (3, 4), (5, 5), (5, 6, 7))},
    "min_new_tokens": {"min_new_tokens": 6, "logit_bias": ((31, 6.0),), "eos_token_ids": (31,)},
    "all": {
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "bad_words": ((1,), (2, 3)),
    },
}


@functools.cache
def _logits(last: tuple[int, ...], salt: int) -> torch.Tensor:
    key = hashlib.sha256(repr((salt, last)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:6], "big"))
    return 2 * torch.randn(VOCAB, generator=generator)


def model(tokens: list[int], salt: int = 0) -> torch.Tensor:
    """Logits [vocab] of a tiny language model: a fixed function of the last two tokens."""
    return _logits(tuple(tokens[-2:]), salt)


def base_rows(history: list[int], proposal: tuple[int, ...]) -> torch.Tensor:
    return torch.stack([model([*history, *proposal[:i]]) for i in range(len(proposal) + 1)])


def drafted(kind: str, d: Decoding, history: list[int], k: int) -> tuple[tuple[int, ...], tuple]:
    """``k`` tokens by a draft that equals the base, resembles it, or is unrelated."""
    tokens: list[int] = []
    rows: list[SparseRow] = []
    for _ in range(k):
        own = model([*history, *tokens])
        other = model([*history, *tokens], salt=1)
        logits = {"equal": own, "close": own + 0.5 * other, "unrelated": other}[kind]
        (token,), (row,) = propose(logits[None], [RowContext(d, history, tuple(tokens))])
        tokens.append(token)
        if row is not None:
            rows.append(row)
    return tuple(tokens), tuple(rows)


def generate(
    decodings: list[Decoding], prompts: list[list[int]], count: int, k: int, draft: str
) -> tuple[list[list[int]], list[list], int]:
    """Speculative decoding of a batch: tokens, log-probabilities, accepted tokens."""
    logs = [list(p) for p in prompts]
    logprobs: list[list] = [[] for _ in prompts]
    accepted = 0
    while any(len(log) < len(p) + count for log, p in zip(logs, prompts, strict=True)):
        items = []
        for d, log in zip(decodings, logs, strict=True):
            proposal, rows = drafted(draft, d, log, k)
            items.append(JudgeItem(d, list(log), proposal, rows))
        logits = torch.cat([base_rows(i.history, i.proposal) for i in items])
        for n, (item, verdict) in enumerate(zip(items, judge(logits, items), strict=True)):
            logs[n] += [*item.proposal[: verdict.num_accepted], verdict.next_token]
            logprobs[n] += verdict.logprobs
            accepted += verdict.num_accepted
    tokens = [log[len(p) : len(p) + count] for log, p in zip(logs, prompts, strict=True)]
    return tokens, [lp[:count] for lp in logprobs], accepted


PROMPTS = [[1, 2, 3], [4, 4], [30], [7, 8, 9, 10, 5, 5]]


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize(("rule", "temperature"), [(GREEDY, 0.0), (COUPLED, 0.9)])
def test_comparing_rules_equal_plain_decoding_for_each_parameter(name, rule, temperature):
    decodings = [
        Decoding(
            rule=rule,
            temperature=temperature,
            seed=n,
            prompt_len=len(prompt),
            logprobs=3,
            **PARAMETERS[name],
        )
        for n, prompt in enumerate(PROMPTS)
    ]
    plain = generate(decodings, PROMPTS, 16, 0, "equal")
    for n in range(len(PROMPTS)):
        alone = generate(decodings[n : n + 1], PROMPTS[n : n + 1], 16, 4, "close")
        assert alone[0][0] == plain[0][n]
    for k in (1, 4, 7):
        for draft in ("equal", "close", "unrelated"):
            tokens, logprobs, _ = generate(decodings, PROMPTS, 16, k, draft)
            assert tokens == plain[0]
            assert logprobs == plain[1]


def test_a_batch_of_different_parameters_equals_each_alone():
    decodings = [
        Decoding(temperature=t, rule=r, prompt_len=len(p), seed=n, **PARAMETERS[name])
        for n, (p, name, t, r) in enumerate(
            zip(
                PROMPTS,
                ("all", "repetition", "top_p", "bad_words"),
                (1.0, 0.0, 0.7, 1.3),
                (COUPLED, GREEDY, REJECTION, REJECTION),
                strict=True,
            )
        )
    ]
    together, _, _ = generate(decodings, PROMPTS, 20, 4, "close")
    for n in range(4):
        alone, _, _ = generate(decodings[n : n + 1], PROMPTS[n : n + 1], 20, 4, "close")
        assert alone[0] == together[n]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_draft_equal_to_the_base_is_always_accepted(rule):
    temperature = 1.0 if rule.samples else 0.0
    d = Decoding(rule=rule, temperature=temperature, seed=3, draft_top=VOCAB)
    _, _, accepted = generate([d], [[1, 2]], 100, 4, "equal")
    assert accepted == 80


def test_rejection_replays_with_the_same_seed_and_draft():
    d = Decoding(rule=REJECTION, temperature=1.0, seed=9)
    first = generate([d], [[1, 2]], 40, 4, "close")
    assert first == generate([d], [[1, 2]], 40, 4, "close")
    other = generate([dataclasses.replace(d, seed=10)], [[1, 2]], 40, 4, "close")
    assert first[0] != other[0]


def test_at_temperature_zero_every_rule_is_greedy():
    plain = generate([Decoding()], [[1, 2]], 30, 0, "equal")
    for rule in RULES.values():
        d = Decoding(rule=rule)
        assert generate([d], [[1, 2]], 30, 4, "close")[0] == plain[0]


def rejection_in_plain_python(
    processed: torch.Tensor, item: JudgeItem, *, seed: int
) -> tuple[int, int]:
    """The algorithm of the papers for one item, one token after the other, in float64."""
    noise = lambda position, stream: gumbel(  # noqa: E731
        seed_tensor([seed]), torch.tensor([position]), VOCAB, stream=stream
    )[0].double()
    p = processed.double().softmax(-1)
    n = len(item.history)
    for i, token in enumerate(item.proposal):
        q = torch.zeros(VOCAB, dtype=torch.float64)
        if item.rows:
            q[list(item.rows[i].ids)] = torch.tensor(item.rows[i].probabilities).double()
        else:
            q[token] = 1.0
        u = uniform(seed_tensor([seed]), torch.tensor([n + i]), stream=Stream.ACCEPT)
        if float(u) < float(p[i, token] / q[token]):
            continue
        left = (p[i] - q).clamp(min=0)
        left = left / left.sum()
        return i, int((left.log() + noise(n + i, Stream.RESIDUAL)).argmax())
    k = len(item.proposal)
    return k, int((p[k].log() + noise(n + k, Stream.CHOICE)).argmax())


def test_rejection_equals_the_papers_algorithm_on_ragged_batches():
    rng = random.Random(1)
    items, logits, accepted = [], [], 0
    for n in range(600):
        name = rng.choice(["nothing", "top_k", "all", "bias"])
        d = Decoding(
            rule=REJECTION,
            temperature=rng.choice([0.5, 1.0, 1.5]),
            seed=rng.getrandbits(64),
            draft_top=rng.choice([2, 8, 64]),
            **PARAMETERS[name],
        )
        history = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 9))]
        proposal, rows = drafted(rng.choice(["close", "unrelated"]), d, history, n % 5)
        if rng.random() < 0.2:
            rows = ()
        items.append(JudgeItem(d, history, proposal, rows))
        logits.append(base_rows(history, proposal))
    for item, own, got in zip(items, logits, judge(torch.cat(logits), items), strict=True):
        contexts = [
            RowContext(item.decoding, item.history, item.proposal[:i])
            for i in range(len(item.proposal) + 1)
        ]
        expected = rejection_in_plain_python(process(own, contexts), item, seed=item.decoding.seed)
        assert (got.num_accepted, got.next_token) == expected
        accepted += got.num_accepted
    assert 100 < accepted < 1100


def test_logprobs_are_those_of_the_processed_distribution():
    for d in (
        Decoding(logprobs=4, repetition_penalty=1.5),
        Decoding(logprobs=4, temperature=0.7, top_k=3, rule=COUPLED),
        Decoding(logprobs=4, temperature=0.7, rule=REJECTION),
        Decoding(logprobs=0),
    ):
        history, proposal = [1, 2, 3], drafted("close", d, [1, 2, 3], 3)
        item = JudgeItem(d, history, *proposal)
        logits = base_rows(history, item.proposal)
        (got,) = judge(logits, [item])
        emitted = [*item.proposal[: got.num_accepted], got.next_token]
        assert len(got.logprobs) == len(emitted)
        for i, (token, entry) in enumerate(zip(emitted, got.logprobs, strict=True)):
            row = RowContext(d, history, item.proposal[:i])
            expected = process(logits[i : i + 1], [row])[0].double().log_softmax(-1)
            assert entry.logprob == pytest.approx(float(expected[token]), abs=1e-5)
            n = min(d.logprobs, 3) if d.top_k else d.logprobs
            best = expected.topk(n)
            assert [t for t, _ in entry.top] == best.indices.tolist()
            assert [v for _, v in entry.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_logprobs_are_empty_unless_asked_for():
    asked, silent = Decoding(logprobs=1), Decoding()
    logits = base_rows([1], ())
    answers = judge(torch.cat([logits, logits]), [JudgeItem(silent, [1]), JudgeItem(asked, [1])])
    assert answers[0] == Judged(0, int(logits.argmax()))
    assert len(answers[1].logprobs) == 1


def test_accepted_prefix_stops_at_the_first_difference():
    assert accepted_prefix([5, 6, 7, 8], (5, 6, 7)) == 3
    assert accepted_prefix([5, 9, 7, 8], (5, 6, 7)) == 1
    assert accepted_prefix([0], ()) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_logits_that_are_not_finite_do_not_disturb_the_other_items(rule, bad):
    d = Decoding(rule=rule, temperature=1.0 if rule.samples else 0.0, top_p=0.9, logprobs=2)
    items = [JudgeItem(d, [n], *drafted("close", d, [n], 2)) for n in (1, 2, 3)]
    logits = torch.cat([base_rows([n], item.proposal) for n, item in enumerate(items, 1)])
    expected = judge(logits, items)
    logits[3:6] = bad
    answers = judge(logits, items)
    assert (answers[0], answers[2]) == (expected[0], expected[2])
    assert 0 <= answers[1].next_token < VOCAB


@pytest.mark.gpu
def test_judge_and_propose_on_a_gpu_equal_the_cpu():
    rng = random.Random(2)
    items, logits = [], []
    for n in range(300):
        rule = rng.choice(list(RULES.values()))
        d = Decoding(
            rule=rule,
            temperature=rng.choice([0.7, 1.0]) if rule.samples else 0.0,
            seed=rng.getrandbits(64),
            logprobs=2,
            draft_top=rng.choice([4, 64]),
            **PARAMETERS[rng.choice(list(PARAMETERS))],
        )
        history = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 9))]
        items.append(JudgeItem(d, history, *drafted("close", d, history, n % 5)))
        logits.append(base_rows(history, items[-1].proposal))
    raw = torch.cat(logits)
    for own, other in zip(judge(raw, items), judge(raw.cuda(), items), strict=True):
        assert (own.num_accepted, own.next_token) == (other.num_accepted, other.next_token)
        for a, b in zip(own.logprobs, other.logprobs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    first = torch.stack([rows[0] for rows in logits])
    contexts = [RowContext(item.decoding, item.history) for item in items]
    on_cpu, on_gpu = propose(first, contexts), propose(first.cuda(), contexts)
    assert on_cpu[0] == on_gpu[0]
    for a, b in zip(on_cpu[1], on_gpu[1], strict=True):
        assert (a is None) == (b is None)
        assert a is None or a.ids == b.ids
