"""Rows of short and long sequences in one forward, against transformers on each alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from outrider.shared.config.schema import ModelConfig
from outrider.shared.core.errors import ConfigError
from outrider.shared.model.hf.length_rotary import LengthRotary
from outrider.shared.model.loading import make_runner
from outrider.shared.model.runner import Runner, Span
from outrider_testing.architectures import BORDER, LENGTHS, tiny

LONG = [(7 * i) % 97 for i in range(BORDER + 16)]
SHORT = LONG[:9]


def runner(model: Any, **settings: Any) -> Runner:
    options: dict[str, Any] = {"device": "cpu", "arena_bytes": 8 << 20, "max_sequences": 4}
    return make_runner(model, ModelConfig(path="x", **options | settings))


def own_logits(model: Any, tokens: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


@pytest.mark.parametrize("name", LENGTHS)
def test_rows_are_those_of_their_own_sequence_whatever_runs_with_them(name: str) -> None:
    """What is taken in whole, beside a long sequence and in chunks."""
    model = tiny(*LENGTHS[name])
    with torch.inference_mode():
        short, long = own_logits(model, SHORT), own_logits(model, LONG)
        mine = runner(model)
        one, other, third = (mine.arena.admit(64) for _ in range(3))
        found = mine.forward([Span(one, 0, SHORT, 9), Span(other, 0, LONG, len(LONG), 0)])
        assert torch.allclose(found[:9], short, atol=1e-3)
        assert torch.allclose(found[9:], long, atol=1e-3)
        for start in range(0, len(LONG), 8):
            found = mine.forward([Span(third, start, LONG[start : start + 8], 8, 0)])
            assert torch.allclose(found, long[start : start + 8], atol=1e-3)


@pytest.mark.parametrize("kind", ["phi3", "mistral"])
def test_a_span_that_rings_cut_stays_that_of_its_sequence(kind: str) -> None:
    rope = LENGTHS["Phi-3 (longrope)"][1]
    model = tiny(kind, rope | {"sliding_window": 16})
    with torch.inference_mode():
        wanted = own_logits(model, LONG)
        mine = runner(model, prefill_chunk=8, max_k=4)
        assert mine.arena.max_rows == 8
        found = mine.forward([Span(mine.arena.admit(64), 0, LONG, 5, 0)])
    assert torch.allclose(found, wanted[-5:], atol=1e-3)


def test_a_model_with_longrope_in_some_layers_is_refused_by_field() -> None:
    class Rotary(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rope_type = {"full_attention": "longrope", "sliding_attention": "default"}

    with pytest.raises(ConfigError, match=r"rope_parameters: got .* must be that of all layers"):
        LengthRotary(Rotary())
