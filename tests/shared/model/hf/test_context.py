"""How long sequences may be, against transformers on sequences that long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.shared.config.schema import ModelConfig
from outrider.shared.core.errors import ConfigError
from outrider.shared.model.hf.context import context_of
from outrider.shared.model.loading import load_runner
from outrider.shared.model.runner import Runner, Span
from outrider_testing import engines
from outrider_testing.architectures import tiny

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "factor": 2.5}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32}
BY_LAYERS = {
    "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def load(model: Any, folder: Path, **settings: Any) -> Runner:
    model.save_pretrained(folder)
    options: dict[str, Any] = {"device": "cpu", "arena_bytes": 4 << 20, "max_sequences": 8}
    return load_runner(ModelConfig(path=str(folder), **options | settings))


@pytest.mark.parametrize(
    ("positions", "rope", "context"),
    [
        (32, YARN, 128),
        (128, YARN, 128),
        (200, YARN, 200),
        (40, LINEAR, 100),
        (64, {"rope_type": "dynamic", "factor": 2.0}, 64),
        (64, {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32}, 64),
        (96, {"rope_type": "default"}, 96),
        (
            96,
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            96,
        ),
    ],
)
def test_context_counts_the_scale_of_rotary_embeddings_once(
    positions: int, rope: dict[str, Any], context: int
) -> None:
    model = engines.tiny_llama(
        max_position_embeddings=positions, rope_parameters={"rope_theta": 1e4, **rope}
    )
    assert context_of(model.config) == context


@pytest.mark.parametrize("rope", [YARN, LINEAR, DYNAMIC])
@pytest.mark.parametrize("runner", ["auto", "generic"])
def test_a_scaled_context_is_served_to_its_end(
    rope: dict[str, Any], runner: str, tmp_path: Path
) -> None:
    model = engines.tiny_llama(
        3,
        max_position_embeddings=72 if rope is DYNAMIC else 32,
        rope_parameters={"rope_theta": 1e4, **rope},
    )
    mine = load(model, tmp_path, runner=runner)
    length = mine.facts.max_positions
    assert length > 64
    tokens = [(7 * i) % 97 for i in range(length)]
    with torch.inference_mode():
        logits = mine.forward([Span(mine.arena.admit(length), 0, tokens, 9)])
        assert torch.allclose(logits, model(torch.tensor([tokens])).logits[0, -9:], atol=1e-3)


def test_max_positions_takes_the_place_of_the_context(tmp_path: Path) -> None:
    assert load(engines.tiny_llama(), tmp_path / "a", max_positions=40).facts.max_positions == 40
    longer = load(engines.tiny_llama(), tmp_path / "b", max_positions=4000)
    assert longer.facts.max_positions == 4000
    assert load(tiny("bloom", {}), tmp_path / "c", max_positions=300).facts.max_positions == 300


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt2", {}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
        ("gemma3_text", {"rope_parameters": BY_LAYERS}),
    ],
)
def test_max_positions_beyond_what_the_model_has_are_refused(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="max_positions: got 129; must be at most 128"):
        load(tiny(kind, changes), tmp_path, max_positions=129)


@pytest.mark.parametrize("runner", ["auto", "generic"])
def test_windows_in_every_layer_hold_any_length(runner: str, tmp_path: Path) -> None:
    """One place of window and chunk, and a sequence of several times that."""
    model = tiny("mistral", {"sliding_window": 16})
    mine = load(model, tmp_path, runner=runner, prefill_chunk=16, max_sequences=1, max_k=4)
    assert mine.arena.longest is None
    assert mine.arena.tokens == 32
    extent = mine.arena.admit(120)
    tokens = [(7 * i) % 97 for i in range(120)]
    with torch.inference_mode():
        wanted = model(torch.tensor([tokens])).logits[0]
        for start in range(0, 120, 8):
            logits = mine.forward([Span(extent, start, tokens[start : start + 8], 8)])
            assert torch.allclose(logits, wanted[start : start + 8], atol=1e-3)
