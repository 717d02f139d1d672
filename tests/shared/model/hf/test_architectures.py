"""Every decoder-only architecture over the arena, without code of its own.

For each, a tiny random model: greedy tokens under speculation equal those of Hugging Face's
``generate``, for a ragged batch, with chunked prefill, and with windows that wrap their rings
several times; and after a rollback at every position the logits are those of a full recompute.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.draft_service.engine import DraftEngine
from outrider.shared.config.schema import ModelConfig
from outrider.shared.core.errors import ConfigError
from outrider.shared.model.loading import load_runner
from outrider.shared.model.runner import Runner, Span
from outrider.verify_service.engine import VerifyEngine
from outrider_testing import engines
from outrider_testing.architectures import ARCHITECTURES, WINDOW, tiny

DOCS = Path(__file__).parents[4] / "docs" / "architectures.md"
COUNT, K, SLACK = 16, 3, 6
FORMS: dict[str, Any] = {name: {"max_shard_size": "40KB"} for name in ("GPT-2", "Qwen3")}
"""How some are saved: in several files."""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "T5": ({"model_type": "t5"}, "encoder-decoder"),
    "BART": ({"model_type": "bart"}, "encoder-decoder"),
    "BERT": ({"model_type": "bert"}, "encoder"),
    "Mamba": ({"model_type": "mamba"}, "linear_attention"),
    "Mamba 2": ({"model_type": "mamba2"}, "linear_attention"),
    "Falcon Mamba": ({"model_type": "falcon_mamba"}, "linear_attention"),
    "Jamba": ({"model_type": "jamba"}, "linear_attention"),
    "Falcon-H1": ({"model_type": "falcon_h1"}, "hybrid"),
    "LFM2": (
        {"model_type": "lfm2", "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
        "conv",
    ),
    "RecurrentGemma": ({"model_type": "recurrent_gemma"}, "linear_attention"),
    "Qwen3-Next": ({"model_type": "qwen3_next"}, "linear_attention"),
    "MiniMax": ({"model_type": "minimax"}, "linear_attention"),
    "Llama 4": ({"model_type": "llama4_text"}, "chunked_attention"),
    "Gemma 3n": (
        {"model_type": "gemma3n_text", "num_kv_shared_layers": 10},
        "10 layers that read the keys and values of another layer",
    ),
    "Gemma 4 (small)": (
        {"model_type": "gemma4_text", "num_kv_shared_layers": 18},
        "18 layers that read the keys and values of another layer",
    ),
    "DeepSeek V4": ({"model_type": "deepseek_v4"}, "heavily_compressed_attention"),
    "RWKV": (
        {"model_type": "rwkv", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2},
        "recurrent state",
    ),
}

HEAD = """# Architectures

Any decoder-only model of transformers whose layers are full or sliding-window attention is served
from the arena by its own code, without code for it here. This table is written by
`tests/shared/model/hf/test_architectures.py`, which saves a tiny random model of each, loads it as
the services do, and runs it:

- **greedy**: under speculation with a random draft (K = 3, prefill in chunks), the tokens are those
  of Hugging Face's `generate` on the model alone;
- **rollback**: after rejected rows at every position, the next logits are those of a full
  recompute;
- **ragged**: sequences of different lengths in one batch give what each gives alone.

Windows are 8 tokens in rings of 14, over 39 positions, so that every ring wraps. *cpu* is the
compiled forward for the Llama block family; *generic, packed* forwards the rows of all sequences
at once through transformers' attention registry; *generic, one by one* is for models whose
attention does not go through the registry. Which of the last two a model can do is found out when
it is loaded, by comparing with its own plain forward.

| model | class | layers | path | greedy | rollback | ragged |
|---|---|---|---|---|---|---|
"""
TAIL = """
A rotary embedding that takes other factors for long sequences (`longrope`) gives each row those of
its own sequence: Phi-3 and its kin take a sequence in anew where it becomes long, as their
`generate` does, others keep what they cached. One whose frequencies change with every token
(`dynamic`) is served up to `max_position_embeddings`, where that begins. What the files of a
checkpoint lack, have too much of, or have in another shape is refused at load by name.

Refused at load, with the reason: encoder-decoders (T5, BART), encoders (BERT), state-space and
linear attention and their hybrids (Mamba, Mamba 2, Jamba, Falcon-H1, LFM2, RWKV, RecurrentGemma,
Qwen3-Next, MiniMax), whose state can't be rolled back by a length; chunked and compressed attention
(Llama 4, DeepSeek V4); layers that read the keys and values of another layer (Gemma 3n, small
Gemma 4).
"""

_seen: dict[str, str] = {}


def rollback_everywhere(runner: Runner, full: torch.Tensor, tokens: list[int]) -> None:
    """Token by token, each with rows of another text behind it, which are rejected."""
    extent = runner.arena.admit(len(tokens) + K + 1)
    for length, token in enumerate(tokens):
        assert runner.arena.rollback(extent, length)
        junk = [(token + 17 * i) % 97 for i in range(1, K + 2)]
        logits = runner.forward([Span(extent, length, [token, *junk], K + 2)])
        scale = max(1.0, full[length].abs().max().item())
        assert (logits[0] - full[length]).abs().max().item() < 2e-3 * scale, length
    runner.arena.free(extent)


@pytest.fixture(scope="module")
def draft() -> DraftEngine:
    return DraftEngine(engines.runner(engines.tiny_llama(3, layers=1, hidden=16)), K)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_keeps_its_tokens(name: str, draft: DraftEngine, tmp_path: Path) -> None:
    from transformers import CONFIG_MAPPING

    if ARCHITECTURES[name][0] not in CONFIG_MAPPING:
        pytest.skip("this release of transformers does not have it")
    model = tiny(*ARCHITECTURES[name])
    asked = [engines.prompts(1, seed=n, shortest=n, longest=n)[0] for n in (3, 11, 23)]
    wanted = [engines.reference(model, prompt, COUNT) for prompt in asked]
    text = asked[2] + wanted[2]
    with torch.inference_mode():
        full = model(torch.tensor([text])).logits[0].clone()
    # As users do: from files.
    model.save_pretrained(tmp_path, **FORMS.get(name, {}))
    assert len(list(tmp_path.glob("model*.safetensors"))) == (3 if name in FORMS else 1)
    settings: dict[str, Any] = {"device": "cpu", "arena_bytes": 4 << 20, "max_sequences": 16}
    runner = load_runner(ModelConfig(path=str(tmp_path), max_k=K, prefill_chunk=SLACK, **settings))
    rings = [pool for pool in runner.arena.pools if pool.window is not None]
    assert all(pool.window + pool.slack == WINDOW + SLACK for pool in rings)
    courses = engines.speculate(VerifyEngine(runner, K), draft, asked, COUNT, K, chunk=SLACK)
    assert [course.written for course in courses] == wanted
    with torch.inference_mode():
        rollback_everywhere(runner, full, text)
    kinds = ["sliding" if p.window is not None else "full" for p in runner.arena.pools]
    path = runner.facts.runner
    if path == "generic":
        path = "generic, packed" if runner.packed else "generic, one by one"
    facts = [name, f"`{runner.facts.architecture}`", " + ".join(kinds), path, *["yes"] * 3]
    _seen[name] = f"| {' | '.join(facts)} |"


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_can_not_work_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    fields, reason = REFUSED[name]
    config = CONFIG_MAPPING[fields["model_type"]](
        **{k: v for k, v in fields.items() if k != "model_type"}
    )
    if name == "RWKV":  # told by its class alone, so there must be a model
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    else:
        config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=reason):
        load_runner(ModelConfig(path=str(tmp_path), device="cpu"))


def test_the_table_in_the_docs_is_what_ran() -> None:
    if set(_seen) != set(ARCHITECTURES):
        pytest.skip("not every architecture ran")
    text = HEAD + "\n".join(_seen[name] for name in ARCHITECTURES) + "\n" + TAIL
    if os.environ.get("OUTRIDER_UPDATE_DOCS"):
        DOCS.write_text(text, encoding="utf-8")
    assert len(_seen) >= 40
    assert DOCS.read_text(encoding="utf-8") == text, "run again with OUTRIDER_UPDATE_DOCS=1"
