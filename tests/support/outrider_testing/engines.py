"""Tiny models and a small loop over real engines, for tests of the arena, runners and engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from outrider.draft_service.engine import DraftEngine
from outrider.shared.config.schema import ModelConfig
from outrider.shared.core.types import (
    Decoding,
    OpenSequence,
    PositionLogprobs,
    Proposal,
    ProposeItem,
    VerifyItem,
)
from outrider.shared.model.loading import make_runner
from outrider.shared.model.runner import Runner
from outrider.verify_service.engine import VerifyEngine

VOCAB = 97


def tiny_llama(seed: int = 0, *, layers: int = 2, hidden: int = 32, **changes: Any) -> Any:
    """A random Llama with grouped queries, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    torch.manual_seed(seed)
    made: Any = LlamaForCausalLM(LlamaConfig(**(settings | changes)))
    return made.eval()


def tiny_gpt2(seed: int = 0, *, layers: int = 2, hidden: int = 32, **changes: Any) -> Any:
    """A random GPT-2, float32."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = {
        "vocab_size": VOCAB,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": 4,
        "n_positions": 512,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(seed)
    made: Any = GPT2LMHeadModel(GPT2Config(**(settings | changes)))
    return made.eval()


def tiny_gemma2(seed: int = 0, *, window: int = 8, **changes: Any) -> Any:
    """A random Gemma 2, float32: one layer of a sliding window, one of full attention."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "sliding_window": window,
        "layer_types": ["sliding_attention", "full_attention"],
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    torch.manual_seed(seed)
    made: Any = Gemma2ForCausalLM(Gemma2Config(**(settings | changes)))
    return made.eval()


def runner(model: Any, *, release: bool = False, **changes: Any) -> Runner:
    """A runner over a module on the CPU with a small arena."""
    settings: dict[str, Any] = {
        "path": "tiny",
        "device": "cpu",
        "arena_bytes": 4 << 20,
        "prefill_chunk": 64,
        "max_sequences": 16,
    }
    return make_runner(model, ModelConfig(**(settings | changes)), release=release)


def prompts(count: int, *, seed: int = 0, shortest: int = 1, longest: int = 14) -> list[list[int]]:
    """Ragged random prompts."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def reference(model: Any, prompt: Sequence[int], count: int, **options: Any) -> list[int]:
    """What Hugging Face's ``generate`` writes after ``prompt``, greedily; ``options`` of its."""
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([list(prompt)]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
    return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


@dataclass
class Course:
    """What one sequence went through."""

    log: list[int]
    prompt_len: int
    wanted: int
    draft_len: int = 0
    base_len: int = 0
    proposed: int = 0
    accepted: int = 0
    lengths: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)

    @property
    def written(self) -> list[int]:
        return self.log[self.prompt_len :]

    @property
    def done(self) -> bool:
        return len(self.written) >= self.wanted


def speculate(
    verify: VerifyEngine,
    draft: DraftEngine | None,
    asked: Sequence[Sequence[int]],
    count: int,
    k: int | Sequence[int],
    decoding: Decoding | Sequence[Decoding] | None = None,
    chunk: int = 1 << 30,
) -> list[Course]:
    """Writes ``count`` tokens after each prompt, all sequences in each round.

    ``k``, ``decoding``: per sequence, or one for all. ``chunk``: rows of a prefill item.
    """
    ks = [k] * len(asked) if isinstance(k, int) else list(k)
    courses = [Course(list(prompt), len(prompt), count) for prompt in asked]
    base = verify.connect()
    helper = draft.connect() if draft is not None else None
    if decoding is None or isinstance(decoding, Decoding):
        decoding = [decoding or Decoding()] * len(asked)
    for i, course in enumerate(courses):
        request = OpenSequence(i, 1, len(course.log) + count + max(ks) + 1, decoding[i])
        base.open(request)
        if helper is not None:
            helper.open(request)
    while not all(course.done for course in courses):
        live = [i for i, course in enumerate(courses) if not course.done]
        proposals: dict[int, Proposal] = {}
        if helper is not None:
            items = [_ask(i, courses[i], ks[i], chunk) for i in live]
            result = helper.round(items)
            assert not result.refusals, result.refusals
            for item, proposal in zip(items, result.answers, strict=True):
                course = courses[proposal.sequence_id]
                assert len(proposal.tokens) == item.k
                course.draft_len = item.base_len + len(item.append) + max(item.k - 1, 0)
                proposals[proposal.sequence_id] = proposal
        asks = []
        for i in live:
            course = courses[i]
            rest = course.log[course.base_len :]
            if len(rest) > chunk:
                asks.append(
                    VerifyItem(i, 1, course.base_len, tuple(rest[:chunk]), extend_only=True)
                )
            else:
                offer = proposals.get(i)
                judged_too = (offer.tokens, offer.rows) if offer is not None else ()
                asks.append(VerifyItem(i, 1, course.base_len, tuple(rest), *judged_too))
        judged = base.round(asks)
        assert not judged.refusals, judged.refusals
        for ask, verdict in zip(asks, judged.answers, strict=True):
            course = courses[verdict.sequence_id]
            if verdict.next_token is None:
                course.base_len = verdict.committed_len
                continue
            course.proposed += len(ask.proposal)
            course.accepted += verdict.num_accepted
            course.lengths.append(verdict.num_accepted)
            course.logprobs.extend(verdict.logprobs)
            n = len(course.log)
            course.log.extend(ask.proposal[: verdict.num_accepted])
            course.log.append(verdict.next_token)
            assert verdict.committed_len == len(course.log)
            course.base_len = len(course.log) - 1
            course.draft_len = min(course.draft_len, n + verdict.num_accepted)
    base.release()
    if helper is not None:
        helper.release()
    for course in courses:
        del course.log[course.prompt_len + count :]
        del course.logprobs[count:]
    return courses


def _ask(sequence: int, course: Course, k: int, chunk: int) -> ProposeItem:
    """Never more than fits: proposals beyond what is wanted are cut."""
    start = min(course.draft_len, len(course.log) - 1)
    rest = course.log[start:]
    if len(rest) > chunk:
        return ProposeItem(sequence, 1, start, tuple(rest[:chunk]), 0)
    left = course.wanted - len(course.written)
    # While the base still takes in its prompt there is nothing to judge.
    if len(course.log) - course.base_len > chunk:
        return ProposeItem(sequence, 1, start, tuple(rest), 0)
    return ProposeItem(sequence, 1, start, tuple(rest), min(k, left))
