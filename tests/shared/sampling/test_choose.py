"""Processed logits against transformers' own processors; choices against plain references."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from outrider.shared.core.rules import COUPLED, GREEDY, REJECTION
from outrider.shared.core.types import Decoding
from outrider.shared.sampling.choose import (
    RowContext,
    choice_noise,
    choose,
    process,
    propose,
    sample,
)
from outrider.shared.sampling.noise import Stream, gumbel, gumbel_at, seed_tensor
from outrider.shared.sampling.penalties import is_penalised
from outrider.shared.sampling.warpers import truncates

VOCAB = 211
EOS = (3, 17)
PARAMETERS = {
    "nothing": {},
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 1.9},
    "top_k": {"temperature": 1.0, "top_k": 7},
    "top_k_1": {"temperature": 1.0, "top_k": 1},
    "top_k_beyond": {"temperature": 1.0, "top_k": 5000},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "top_p_small": {"temperature": 1.0, "top_p": 1e-6},
    "top_p_wide": {"temperature": 2.0, "top_p": 0.999},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "repetition": {"repetition_penalty": 1.3},
    "repetition_reward": {"repetition_penalty": 0.7},
    "presence": {"presence_penalty": 0.6},
    "frequency": {"frequency_penalty": -0.4},
    "bias": {"logit_bias": ((5, 2.5), (0, -100.0), (VOCAB + 5, 1.0))},
    "bad_words": {"bad_words": ((9,), (1, 2), (4, 5, 6), (3,), (VOCAB + 5,), (10,) * 40)},
    "min_new_tokens": {"min_new_tokens": 8},
}


def decoding(**parameters) -> Decoding:
    return Decoding(**{"eos_token_ids": EOS, "prompt_len": 4, **parameters})


def processors_of(d: Decoding) -> list:
    """transformers' processors for ``d``, in the order of its generate()."""
    chain: list = []
    bias = {(t,): b for t, b in d.logit_bias if t < VOCAB}
    if bias:
        chain.append(hf.SequenceBiasLogitsProcessor(bias))
    if d.repetition_penalty != 1.0:
        chain.append(hf.RepetitionPenaltyLogitsProcessor(d.repetition_penalty))
    chain.append(openai_penalties(d))
    words = [list(w) for w in d.bad_words if max(w) < VOCAB]
    if words:
        chain.append(hf.NoBadWordsLogitsProcessor(words, None))  # a ban is a ban
    if d.min_new_tokens:
        chain.append(
            hf.MinNewTokensLengthLogitsProcessor(d.prompt_len, d.min_new_tokens, list(EOS))
        )
    if d.temperature > 0:
        chain.append(hf.TemperatureLogitsWarper(d.temperature))
        if d.top_k:
            chain.append(hf.TopKLogitsWarper(d.top_k))
        if d.top_p < 1:
            chain.append(hf.TopPLogitsWarper(d.top_p))
        if d.min_p:
            chain.append(hf.MinPLogitsWarper(d.min_p))
    return chain


def openai_penalties(d: Decoding):
    """The published formula, counted in plain Python."""

    def apply(input_ids, scores):
        scores = scores.clone()
        output = input_ids[0, d.prompt_len :].tolist()
        for token in set(output):
            scores[0, token] -= output.count(token) * d.frequency_penalty + d.presence_penalty
        return scores

    return apply


def transformers_processed(logits: torch.Tensor, row: RowContext) -> torch.Tensor:
    tokens = torch.tensor([[*row.history, *row.tail]])
    return LogitsProcessorList(processors_of(row.decoding))(tokens, logits[None].float())[0]


def assert_processed_equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(got == -math.inf, expected == -math.inf)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def random_rows(count: int, make_decoding, seed: int) -> tuple[torch.Tensor, list[RowContext]]:
    rng = random.Random(seed)
    # Few distinct tokens, so that penalties and bad words meet them often.
    token = lambda: rng.randrange(12)  # noqa: E731
    rows = []
    while len(rows) < count:
        d = make_decoding(rng)
        history = [token() for _ in range(rng.randrange(d.prompt_len, 20))]
        tail = [token() for _ in range(rng.randrange(0, 6))]
        rows += [RowContext(d, history, tail[:i]) for i in range(len(tail) + 1)]
    rows = rows[:count]
    logits = 4 * torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed))
    return logits, rows


@pytest.mark.parametrize("name", PARAMETERS)
def test_process_equals_transformers_for_each_parameter(name):
    logits, rows = random_rows(40, lambda rng: decoding(**PARAMETERS[name]), seed=1)
    for got, raw, row in zip(process(logits, rows), logits, rows, strict=True):
        assert_processed_equal(got, transformers_processed(raw, row))


def test_process_equals_transformers_for_mixed_rows_with_many_parameters():
    def mixed(rng: random.Random) -> Decoding:
        chosen: dict = {}
        for name in rng.sample(list(PARAMETERS), rng.randrange(8)):
            chosen.update(PARAMETERS[name])
        if rng.random() < 0.5:
            chosen["temperature"] = rng.choice([0.3, 1.0, 1.4])
        return decoding(**chosen)

    logits, rows = random_rows(300, mixed, seed=2)
    for got, raw, row in zip(process(logits, rows), logits, rows, strict=True):
        assert_processed_equal(got, transformers_processed(raw, row))


def test_top_p_over_a_flat_distribution_looks_past_its_first_tries():
    logits = 0.01 * torch.randn(2, 4000, generator=torch.Generator().manual_seed(3))
    for top_p in (0.01, 0.2, 0.9):
        row = RowContext(Decoding(temperature=1.0, top_p=top_p), [1])
        expected = hf.TopPLogitsWarper(top_p)(None, logits)
        got = process(logits, [row, row])
        # Rounding of the two cumulative sums may move the border by a token.
        assert int(((got == -math.inf) != (expected == -math.inf)).sum()) <= 2
        assert abs(float(got.exp().sum() / logits.exp().sum()) - top_p) < 1e-3


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_row_does_not_depend_on_the_others(name):
    rng = random.Random(5)
    others = [decoding(**p) for p in PARAMETERS.values()]
    logits, rows = random_rows(60, lambda _: rng.choice(others), seed=5)
    rows[7] = dataclasses.replace(rows[7], decoding=decoding(**PARAMETERS[name]))
    alone = process(logits[7:8], rows[7:8])[0]
    assert torch.equal(process(logits, rows)[7], alone)


@pytest.mark.parametrize("name", PARAMETERS)
def test_tokens_proposed_in_the_round_count_like_committed_ones(name):
    logits, rows = random_rows(30, lambda rng: decoding(**PARAMETERS[name]), seed=6)
    flat = [RowContext(r.decoding, [*r.history, *r.tail]) for r in rows]
    assert torch.equal(process(logits, rows), process(logits, flat))


def test_process_returns_its_input_when_nothing_applies_and_never_writes_to_it():
    logits, rows = random_rows(5, lambda rng: decoding(), seed=7)
    assert process(logits, rows) is logits
    kept = logits.clone()
    for parameters in PARAMETERS.values():
        process(logits, [RowContext(decoding(**parameters), [5, 6, 7, 8, 9])] * 5)
    assert torch.equal(logits, kept)


def test_process_takes_half_precision():
    logits, rows = random_rows(5, lambda rng: decoding(temperature=0.5, top_k=9), seed=8)
    half = logits.to(torch.bfloat16)
    assert torch.equal(process(half, rows), process(half.float(), rows))


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 5e-324])
def test_a_tiny_temperature_is_the_argmax(temperature):
    logits, rows = random_rows(20, lambda rng: decoding(temperature=temperature), seed=9)
    processed = process(logits * 1e4, rows)
    assert not processed.isnan().any()
    assert choose(processed, rows) == logits.argmax(-1).tolist()


def test_ties_at_the_border_are_kept():
    logits = torch.tensor([[1.0, 3.0, 1.0, 1.0, 0.0]])
    for parameters in ({"top_k": 2}, {"top_p": 0.8}):
        row = RowContext(Decoding(temperature=1.0, **parameters), [0])
        assert (process(logits, [row]) > -math.inf).tolist() == [[True, True, True, True, False]]


def test_choose_at_zero_takes_the_lowest_id_of_ties():
    logits = torch.tensor([[1.0, 5.0, 5.0, 2.0], [7.0, 0.0, 7.0, 7.0]])
    assert choose(logits, [RowContext(Decoding(), [1])] * 2) == [1, 0]


@pytest.mark.parametrize("name", [n for n in PARAMETERS if "temperature" in PARAMETERS[n]])
def test_choose_is_the_argmax_of_processed_logits_plus_noise(name):
    rng = random.Random(10)
    make = lambda _: decoding(**PARAMETERS[name], seed=rng.getrandbits(64))  # noqa: E731
    logits, rows = random_rows(50, make, seed=10)
    processed = process(logits, rows)
    seeds = seed_tensor([r.decoding.seed for r in rows])
    positions = torch.tensor([r.position for r in rows])
    expected = (processed + gumbel(seeds, positions, VOCAB)).argmax(-1).tolist()
    assert choose(processed, rows) == expected
    assert sample(processed, seeds, positions).tolist() == expected
    noise = choice_noise([r.decoding for r in rows], positions.tolist(), VOCAB, "cpu")
    assert choose(processed, rows, noise) == expected


def test_choose_of_mixed_rows_equals_each_alone():
    rng = random.Random(11)
    kinds = [decoding(**p) for p in PARAMETERS.values()]
    make = lambda _: dataclasses.replace(rng.choice(kinds), seed=rng.getrandbits(64))  # noqa: E731
    logits, rows = random_rows(80, make, seed=11)
    together = choose(process(logits, rows), rows)
    alone = [
        choose(process(logits[i : i + 1], rows[i : i + 1]), rows[i : i + 1])[0] for i in range(80)
    ]
    assert together == alone
    noise = choice_noise([r.decoding for r in rows], [r.position for r in rows], VOCAB, "cpu")
    assert noise is not None
    assert choose(process(logits, rows), rows, noise) == together


def test_choice_noise_is_none_where_none_is_wanted():
    assert choice_noise([Decoding()], [4], VOCAB, "cpu") is None
    few = Decoding(temperature=1.0, top_k=5)
    assert truncates(few) and choice_noise([few], [4], VOCAB, "cpu") is None


def test_a_tail_or_penalty_is_noticed():
    assert not is_penalised(decoding())
    for name in ("repetition", "presence", "frequency", "bias", "bad_words", "min_new_tokens"):
        assert is_penalised(decoding(**PARAMETERS[name]))


def test_propose_is_choose_under_the_comparing_rules():
    for rule, temperature in ((GREEDY, 0.0), (COUPLED, 0.8), (REJECTION, 0.0)):
        make = lambda rng: decoding(temperature=temperature, rule=rule, seed=4)  # noqa: B023, E731
        logits, rows = random_rows(20, make, seed=12)
        tokens, sparse = propose(logits, rows)
        assert tokens == choose(process(logits, rows), rows)
        assert sparse == [None] * 20


@pytest.mark.parametrize("draft_top", [1, 5, 64, 10_000])
def test_propose_under_rejection_sends_the_distribution_it_drew_from(draft_top):
    make = lambda rng: decoding(  # noqa: E731
        temperature=0.9, rule=REJECTION, draft_top=draft_top, seed=rng.getrandbits(64)
    )
    logits, rows = random_rows(20, make, seed=13)
    tokens, sparse = propose(logits, rows)
    full = process(logits, rows).softmax(-1)
    for i, row in enumerate(sparse):
        assert row is not None and len(row.ids) == min(draft_top, VOCAB)
        best = full[i].topk(len(row.ids))
        assert set(row.ids) == set(best.indices.tolist())
        torch.testing.assert_close(torch.tensor(row.probabilities), best.values / best.values.sum())
        seed, position = seed_tensor([rows[i].decoding.seed]), torch.tensor([rows[i].position])
        ids = torch.tensor(row.ids)
        noise = gumbel_at(seed, position, ids, stream=Stream.DRAFT)
        assert tokens[i] == row.ids[int((torch.tensor(row.probabilities).log() + noise).argmax())]


def test_propose_leaves_out_entries_of_probability_zero():
    d = Decoding(temperature=1.0, top_k=3, rule=REJECTION)
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    _, (row,) = propose(logits, [RowContext(d, [1, 2])])
    assert row is not None and len(row.ids) == 3


def test_propose_of_mixed_rules_equals_each_alone():
    rng = random.Random(14)
    kinds = [
        decoding(),
        decoding(temperature=1.0, rule=COUPLED),
        decoding(temperature=0.7, rule=REJECTION, draft_top=4),
        decoding(temperature=0.7, rule=REJECTION, top_p=0.5),
    ]
    make = lambda _: dataclasses.replace(rng.choice(kinds), seed=rng.getrandbits(64))  # noqa: E731
    logits, rows = random_rows(40, make, seed=14)
    tokens, sparse = propose(logits, rows)
    for i in range(40):
        token, (row,) = propose(logits[i : i + 1], rows[i : i + 1])
        assert token == [tokens[i]]
        assert (row is None) == (sparse[i] is None)
        if row is not None:
            assert row.ids == sparse[i].ids


@pytest.mark.parametrize("rule", [GREEDY, COUPLED, REJECTION])
def test_propose_leaves_out_what_the_base_has_no_token_for(rule):
    """A draft padded wider than the base draws as if it were not."""
    temperature = 0.0 if rule is GREEDY else 1.5
    wide = decoding(temperature=temperature, rule=rule, seed=4, vocab_size=VOCAB - 7)
    narrow = decoding(temperature=temperature, rule=rule, seed=4)
    logits, rows = random_rows(20, lambda rng: wide, seed=12)
    logits[:, VOCAB - 7 :] += 50.0
    cut = [RowContext(narrow, row.history, row.tail) for row in rows]
    tokens, sparse = propose(logits, rows)
    assert (tokens, sparse) == propose(logits[:, : VOCAB - 7].contiguous(), cut)
    assert max(tokens) < VOCAB - 7
