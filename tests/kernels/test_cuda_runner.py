"""The CUDA runner with its kernels run on the host: the whole path but for graphs and timing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from outrider.draft_service.engine import DraftEngine
from outrider.kernels import registry
from outrider.kernels.operation import Tools
from outrider.shared.config.schema import ModelConfig
from outrider.shared.core.rules import COUPLED, REJECTION
from outrider.shared.core.types import Decoding, OpenSequence, ProposeItem, VerifyItem
from outrider.shared.model.cuda.runner import CudaRunner
from outrider.shared.model.loading import make_runner
from outrider.shared.model.runner import Span
from outrider.verify_service.engine import VerifyEngine

VOCAB = 128


def model(seed: int = 0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=256,
        initializer_range=0.2,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def runners(emulated):
    """Makes (the plain runner, the CUDA runner on the host) over equal models."""
    tools = Tools(torch.device("cpu"), emulated(90))
    calls = {
        name: next(i for i in operation.implementations if i.name == "cuda").build(tools)
        for name, operation in registry.operations().items()
    }
    config = ModelConfig(
        path="tiny",
        runner="llama",
        device="cpu",
        dtype="bfloat16",
        arena_bytes=1 << 18,
        max_sequences=4,
    )

    def make(seed: int = 0, **changes):
        plain = make_runner(model(seed), config)
        other = make_runner(model(seed), config)
        facts = replace(other.facts, runner="cuda")
        changes = {"max_k": 4, "calls": calls} | changes
        return plain, CudaRunner(other._model, facts, other.storage, **changes)

    return make


def logits_of(runner, tokens, pieces):
    extent = runner.arena.admit(len(tokens) + 1)
    rows, at = [], 0
    for count in pieces:
        rows.append(runner.forward([Span(extent, at, tokens[at : at + count], count)]))
        at += count
    runner.arena.free(extent)
    return torch.cat(rows)


@torch.inference_mode()
def test_logits_agree_with_the_plain_runner_and_do_not_depend_on_the_cut(runners):
    plain, kernels = runners()
    tokens = torch.randint(0, VOCAB, (70,)).tolist()
    expected = logits_of(plain, tokens, [70]).float()
    whole = logits_of(kernels, tokens, [70])
    pieces = logits_of(kernels, tokens, [66, 1, 3])
    assert torch.equal(whole, pieces)
    assert float((whole - expected).norm() / expected.norm()) < 0.02


@torch.inference_mode()
def test_a_branch_goes_on_as_if_it_owned_the_prefix(runners):
    _, kernels = runners()
    tokens = torch.randint(0, VOCAB, (50,)).tolist()
    alone = logits_of(kernels, tokens, [40, 10])
    owner = kernels.arena.admit(60)
    kernels.forward([Span(owner, 0, tokens[:40], 0)])
    branches = [kernels.share(owner, 37, 60) for _ in range(2)]
    assert all(branch.parent is owner for branch in branches)
    spans = [Span(branch, 37, tokens[37:50], 13) for branch in branches]
    assert torch.equal(kernels.forward(spans), alone[37:].repeat(2, 1))
    kernels.forward([Span(owner, 40, tokens[40:], 0)])
    last = [Span(one, 50, [7], 1) for one in (owner, *branches)]
    first, *others = kernels.propose(last, [Decoding()] * 3, [4] * 3)
    assert others == [first, first] and len(first) == 4


def generate(verify, draft, prompt, count, k, decoding):
    base, side = verify.connect(), draft.connect()
    for session in (base, side):
        session.open(OpenSequence(1, 0, len(prompt) + count + 8, decoding))
    log, held, side_held = list(prompt), 0, 0
    while len(log) < len(prompt) + count:
        asked = min(k, len(prompt) + count - len(log) - 1)
        proposal, rows = (), ()
        if asked > 0:
            item = ProposeItem(1, 0, side_held, tuple(log[side_held:]), asked)
            result = side.round([item])
            assert not result.refusals
            proposal, rows = result.answers[0].tokens, result.answers[0].rows
        result = base.round([VerifyItem(1, 0, held, tuple(log[held:]), proposal, rows)])
        assert not result.refusals
        verdict = result.answers[0]
        n = len(log)
        log += [*proposal[: verdict.num_accepted], verdict.next_token]
        held = n + verdict.num_accepted
        if asked > 0:
            side_held = min(n + verdict.num_accepted, n + asked - 1)
    for session in (base, side):
        session.release()
    return log


@pytest.mark.parametrize(
    "decoding",
    [Decoding(prompt_len=5), Decoding(prompt_len=5, temperature=0.8, seed=7, rule=COUPLED)],
    ids=["greedy", "coupled"],
)
def test_text_does_not_depend_on_k(runners, decoding):
    _, base = runners()
    _, draft = runners(0)
    verify, propose = VerifyEngine(base, 4), DraftEngine(draft, 4)
    prompt = [3, 1, 4, 1, 5]
    alone = generate(verify, propose, prompt, 6, 0, decoding)
    assert generate(verify, propose, prompt, 6, 3, decoding) == alone
    # Draft and base are the same model here: every proposal stands.
    assert len(alone) == 11


@pytest.mark.parametrize("seed", [0, 1], ids=["equal", "stranger"])
def test_rejection_on_the_device_writes_what_the_plain_path_writes(runners, seed):
    _, base = runners()
    _, draft = runners(seed)
    verify, propose = VerifyEngine(base, 4), DraftEngine(draft, 4)
    decoding = Decoding(prompt_len=5, temperature=1.0, seed=7, rule=REJECTION)
    judge, found = base.judge, []
    base.judge = lambda *arguments: found.append(judge(*arguments)) or found[-1]
    drawn = generate(verify, propose, [3, 1, 4, 1, 5], 5, 3, decoding)
    assert found and None not in found
    base.judge = lambda *arguments: None
    assert generate(verify, propose, [3, 1, 4, 1, 5], 5, 3, decoding) == drawn


def test_a_row_that_is_not_finite_is_refused(runners):
    _, base = runners()
    base._embedding.data[9] = float("nan")
    session = VerifyEngine(base, 4).connect()
    session.open(OpenSequence(1, 0, 16, Decoding()))
    result = session.round([VerifyItem(1, 0, 0, (3, 9), ())])
    assert [r.code for r in result.refusals] == [6]
