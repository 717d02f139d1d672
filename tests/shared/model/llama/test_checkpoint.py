"""Plain checkpoints read here against the same ones read by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from outrider.shared.config.schema import ModelConfig
from outrider.shared.model.hf.loading import choose_dtype, load_model
from outrider.shared.model.llama.checkpoint import load_plain
from outrider.shared.model.loading import load_runner
from outrider.shared.model.runner import Span
from outrider_testing.checkpoints import write_llama

CPU = torch.device("cpu")


def plain(folder: Path, dtype: str = "auto") -> Any:
    return load_plain(str(folder), lambda config: choose_dtype(dtype, config, CPU), CPU)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_checkpoint_weights_equal_those_of_transformers(tiny_base: Path, dtype: str) -> None:
    ours, theirs = plain(tiny_base, dtype), load_model(str(tiny_base), dtype, CPU)
    wanted = dict(theirs.named_parameters())
    assert {name for name, _ in ours.named_parameters()} == set(wanted)
    for name, tensor in ours.named_parameters():
        assert tensor.dtype == wanted[name].dtype
        assert torch.equal(tensor, wanted[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_checkpoint_rotary_equals_that_of_transformers(tiny_base: Path, dtype: torch.dtype) -> None:
    ours, theirs = plain(tiny_base), load_model(str(tiny_base), "auto", CPU)
    positions = torch.arange(1000)[None]
    like = torch.zeros(1, dtype=dtype)
    for a, b in zip(
        ours.model.rotary_emb(like, positions),
        theirs.model.rotary_emb(like, positions),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_checkpoint_logits_and_facts_equal_those_of_transformers(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(path=str(tiny_base), device="cpu", arena_bytes=1 << 22)
    ours = load_runner(config)
    monkeypatch.setattr("outrider.shared.model.loading.load_plain", lambda *_: None)
    theirs = load_runner(config)
    assert ours.facts == theirs.facts
    logits = []
    with torch.inference_mode():
        for runner in (ours, theirs):
            extent = runner.arena.admit(64)
            logits.append(runner.forward([Span(extent, 0, list(range(3, 43)), 40)]))
    assert torch.equal(*logits)


def test_checkpoint_tied_embeddings_are_held_once(tmp_path: Path) -> None:
    folder = write_llama(tmp_path, layers=1, hidden=32, seed=4, tie_word_embeddings=True)
    assert plain(folder) is None  # its head is another one: left to transformers
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    for _ in range(2):
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        ours = plain(folder)
        assert ours.lm_head.weight is ours.model.embed_tokens.weight
        tensors.pop("lm_head.weight", None)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
        {"attention_bias": True},
        {"model_type": "gpt2"},
        {"architectures": ["MistralForCausalLM"]},
        {"quantization_config": {"quant_method": "gptq"}},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 1},
        {"hidden_size": 48},
    ],
)
def test_checkpoint_leaves_what_is_not_plain_to_transformers(
    tiny_base: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    for file in tiny_base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    fields = json.loads((tiny_base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | changes))
    assert plain(tmp_path) is None


@pytest.mark.parametrize("damage", ["no weights", "cut weights", "no config", "odd config"])
def test_checkpoint_leaves_broken_folders_to_transformers(
    tiny_base: Path, tmp_path: Path, damage: str
) -> None:
    for file in tiny_base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    if damage == "no weights":
        weights.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no config":
        (tmp_path / "config.json").unlink()
    else:
        (tmp_path / "config.json").write_text("[]")
    assert plain(tmp_path) is None
