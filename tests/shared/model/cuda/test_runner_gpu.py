"""The CUDA runner against transformers, and against itself: parity and exactness."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from outrider.draft_service.engine import DraftEngine
from outrider.shared.config.schema import ModelConfig
from outrider.shared.core.rules import COUPLED
from outrider.shared.core.types import Decoding, OpenSequence, ProposeItem, VerifyItem
from outrider.shared.model.loading import make_runner
from outrider.shared.model.runner import Runner, Span
from outrider.verify_service.engine import VerifyEngine

pytestmark = pytest.mark.gpu
VOCAB = 2048


def model(family: str, dtype: torch.dtype, seed: int = 0, **changes: Any) -> Any:
    import transformers

    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "initializer_range": 0.05,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    config = getattr(transformers, f"{family}Config")(**(settings | changes))
    built = getattr(transformers, f"{family}ForCausalLM")(config)
    if family == "Qwen3":
        for layer in built.model.layers:
            layer.self_attn.q_norm.weight.data.normal_(1.0, 0.2)
    return built.to("cuda", dtype).eval()


def runner(own: Any, **changes: Any) -> Runner:
    settings = {"path": "tiny", "device": "cuda", "arena_bytes": 64 << 20, "max_k": 8}
    return make_runner(own, ModelConfig(**(settings | changes)))


def logits_of(own: Runner, tokens: list[int], pieces: list[int]) -> torch.Tensor:
    extent = own.arena.admit(len(tokens) + 1)
    rows, at = [], 0
    for count in pieces:
        rows.append(own.forward([Span(extent, at, tokens[at : at + count], count)]))
        at += count
    own.arena.free(extent)
    return torch.cat(rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"head_dim": 128, "tie_word_embeddings": True}),
        ("Qwen2", {}),
        ("Qwen3", {}),
        ("Mistral", {"sliding_window": 70}),
    ],
)
@torch.inference_mode()
def test_logits_match_transformers(family, changes, dtype):
    tokens = torch.randint(0, VOCAB, (200,)).tolist()
    reference = model(family, torch.float32, **changes)
    for parameter in reference.parameters():
        parameter.data = parameter.data.to(dtype).float()
    expected = reference(torch.tensor([tokens], device="cuda")).logits[0]
    plain = model(family, dtype, **changes)(torch.tensor([tokens], device="cuda")).logits[0].float()
    own = runner(model(family, dtype, **changes))
    assert own.facts.runner == "cuda"
    got = logits_of(own, tokens, [200])
    error = float((got - expected).norm() / expected.norm())
    theirs = float((plain - expected).norm() / expected.norm())
    # Never much farther from float32 than transformers' own chain in this type.
    assert error < 1.3 * theirs + 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_bits_do_not_depend_on_how_a_sequence_was_cut(dtype):
    own = runner(model("Llama", dtype))
    tokens = torch.randint(0, VOCAB, (230,)).tolist()
    single = logits_of(own, tokens, [1] * 230)
    for pieces in ([230], [64, 64, 64, 38], [5] * 46, [1, 2, 3, 4, 7, 9, 16, 17, 33, 48, 64, 26]):
        assert torch.equal(single, logits_of(own, tokens, pieces)), pieces


@torch.inference_mode()
def test_bits_do_not_depend_on_batch_mates():
    own = runner(model("Llama", torch.bfloat16))
    generator = torch.Generator().manual_seed(1)
    logs = [
        torch.randint(0, VOCAB, (n,), generator=generator).tolist()
        for n in (3, 70, 64, 129, 1, 200, 17, 90)
    ]
    alone = [logits_of(own, log, [len(log)])[-1] for log in logs]
    extents = [own.arena.admit(len(log) + 1) for log in logs]
    own.forward([Span(e, 0, log[:-1], 0) for e, log in zip(extents, logs, strict=True) if log[:-1]])
    together = own.forward(
        [Span(e, len(log) - 1, log[-1:], 1) for e, log in zip(extents, logs, strict=True)]
    )
    assert torch.equal(torch.stack(alone), together)


def generate(
    verify: VerifyEngine,
    draft: DraftEngine,
    prompt: list[int],
    count: int,
    k: int,
    decoding: Decoding,
    restart: int | None = None,
) -> list[int]:
    """A small coordinator; at ``restart`` tokens both services forget all and are told again."""
    base, side = verify.connect(), draft.connect()
    opening = OpenSequence(1, 0, len(prompt) + count + 9, decoding)
    base.open(opening), side.open(opening)
    log, held, side_held = list(prompt), 0, 0
    while len(log) < len(prompt) + count:
        if restart is not None and len(log) >= restart:
            base.release(), side.release()
            base, side, restart = verify.connect(), draft.connect(), None
            base.open(opening), side.open(opening)
            held = side_held = 0
        asked = min(k, len(prompt) + count - len(log) - 1)
        proposal: tuple[int, ...] = ()
        if asked > 0:
            asking = ProposeItem(1, 0, side_held, tuple(log[side_held:]), asked)
            proposal = side.round([asking]).answers[0].tokens
        verdict = base.round([VerifyItem(1, 0, held, tuple(log[held:]), proposal)]).answers[0]
        n = len(log)
        log += [*proposal[: verdict.num_accepted], verdict.next_token]
        held = n + verdict.num_accepted
        side_held = min(n + verdict.num_accepted, n + asked - 1) if asked > 0 else side_held
    base.release(), side.release()
    return log


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(prompt_len=20),
        Decoding(prompt_len=20, temperature=1.0, seed=1 << 63, rule=COUPLED),
        Decoding(prompt_len=20, temperature=0.9, top_k=40, seed=5, rule=COUPLED),
    ],
    ids=["greedy", "coupled", "coupled-top-k"],
)
def test_text_is_the_same_for_every_k_and_after_a_restart(decoding):
    verify = VerifyEngine(runner(model("Llama", torch.bfloat16)), 8)
    draft = DraftEngine(runner(model("Llama", torch.bfloat16, seed=0)), 8)
    other = DraftEngine(runner(model("Llama", torch.bfloat16, seed=3)), 8)
    prompt = torch.randint(0, VOCAB, (20,), generator=torch.Generator().manual_seed(2)).tolist()
    alone = generate(verify, draft, prompt, 60, 0, decoding)
    for k in (1, 2, 4, 8):
        assert generate(verify, draft, prompt, 60, k, decoding) == alone, k
    assert generate(verify, other, prompt, 60, 3, decoding) == alone
    assert generate(verify, draft, prompt, 60, 3, decoding, restart=50) == alone


def test_draft_graph_equals_one_forward_after_the_other():
    own = runner(model("Llama", torch.bfloat16))
    spans, logs = [], [[5, 6, 7], [9] * 70, [1]]
    for log in logs:
        extent = own.arena.admit(len(log) + 20)
        spans.append(Span(extent, 0, log, 1))
    decodings = [Decoding(), Decoding(temperature=0.7, seed=3, rule=COUPLED), Decoding()]
    first = own.propose(spans, decodings, [4, 3, 1])
    for _ in range(3):  # eager, captured, replayed
        for span in spans:
            own.arena.rollback(span.extent, 0)
        assert own.propose(spans, decodings, [4, 3, 1]) == first
    assert [len(tokens) for tokens in first] == [4, 3, 1]
    ends = [span.extent.valid_len for span in spans]
    assert ends == [len(log) + k - 1 for log, k in zip(logs, [4, 3, 1], strict=True)]
    step = list(logs[0])
    own.arena.rollback(spans[0].extent, 0)
    for token in first[0]:
        start = spans[0].extent.valid_len
        logits = own.forward([Span(spans[0].extent, start, step[start:], 1)])
        assert int(logits[-1].argmax()) == token
        step.append(token)


def test_a_thousand_rounds_allocate_no_device_memory():
    verify = VerifyEngine(runner(model("Llama", torch.bfloat16, 1)), 4)
    draft = DraftEngine(runner(model("Llama", torch.bfloat16, 2, num_hidden_layers=1)), 4)
    sides = (verify.connect(), draft.connect())
    for side in sides:
        side.open(OpenSequence(1, 1, 100, Decoding()))
    pointers = [t.data_ptr() for e in (verify, draft) for t in e.runner.storage.tensors]
    prompt = tuple(range(40))

    def rounds(count: int) -> None:
        for _ in range(count):
            (proposal,) = sides[1].round([ProposeItem(1, 1, 0, prompt[:8], 3)]).answers
            item = VerifyItem(1, 1, 0, prompt[:8], proposal.tokens)
            assert sides[0].round([item]).answers

    rounds(20)  # graphs are captured the second time their sizes are asked for
    before = torch.cuda.memory_stats()
    rounds(1000)
    after = torch.cuda.memory_stats()
    for counted in ("allocation.all.allocated", "segment.all.allocated"):
        assert after[counted] == before[counted]
    assert pointers == [t.data_ptr() for e in (verify, draft) for t in e.runner.storage.tensors]
