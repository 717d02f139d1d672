"""From a folder to a runner: what is refused and why, types, devices, arenas, fingerprints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from outrider.draft_service import __main__ as draft_program
from outrider.shared.config.schema import ModelConfig
from outrider.shared.core.errors import ConfigError
from outrider.shared.model.hf.loading import choose_dtype
from outrider.shared.model.loading import choose_device, load_runner
from outrider.shared.model.runner import Span
from outrider.shared.model.vocabulary import fingerprint
from outrider.verify_service import __main__ as verify_program


def config(path: Path | str, **changes: Any) -> ModelConfig:
    return ModelConfig(
        **({"path": str(path), "device": "cpu", "arena_bytes": 1 << 20, "threads": 1} | changes)
    )


@pytest.mark.parametrize("runner", ["llama", "generic"])
def test_a_folder_becomes_a_runner(tiny_base: Path, runner: str) -> None:
    told: list[str] = []
    loaded = load_runner(config(tiny_base, runner=runner), told.append)
    facts = loaded.facts
    assert (facts.architecture, facts.vocab_size, facts.dtype) == (
        "LlamaForCausalLM",
        320,
        "float32",
    )
    assert (facts.max_positions, facts.eos_token_ids, facts.runner) == (1024, (0,), runner)
    assert facts.weight_bytes == 4 * facts.parameters
    assert loaded.storage.nbytes <= 1 << 20
    assert any("loading" in message for message in told)
    with torch.inference_mode():
        logits = loaded.forward([Span(loaded.arena.admit(8), 0, [1, 2, 3], 2)])
    assert logits.shape == (2, 320)


def test_both_ways_to_load_hold_the_same_weights(tiny_base: Path) -> None:
    logits = []
    for runner in ("llama", "generic"):
        loaded = load_runner(config(tiny_base, runner=runner))
        with torch.inference_mode():
            logits.append(loaded.forward([Span(loaded.arena.admit(8), 0, [1, 2, 3], 3)]))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "/no/such/folder does not exist"),
        ("./missing", "missing does not exist"),
        ("a/b/c", "a/b/c does not exist"),
    ],
)
def test_a_folder_that_is_not_there_is_told(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_runner(config(name))


def test_a_folder_without_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no model: expected .*config\.json"):
        load_runner(config(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="can't be loaded"):
        load_runner(config(tmp_path))


@pytest.mark.parametrize(
    "written",
    [
        "{not json",
        "[1, 2]",
        '"llama"',
        '{"model_type": ["llama"]}',
        '{"model_type": "nobody"}',
        '{"model_type": "llama", "vocab_size": "many"}',
        '{"model_type": "llama", "hidden_size": 8, "num_attention_heads": 0}',
        '{"model_type": "llama", "rope_scaling": 7}',
        '{"model_type": "llama", "layer_types": 3}',
    ],
)
def test_a_configuration_that_can_not_be_read_is_named(tmp_path: Path, written: str) -> None:
    (tmp_path / "config.json").write_text(written)
    with pytest.raises(ConfigError) as raised:
        load_runner(config(tmp_path))
    told = str(raised.value)
    assert str(tmp_path / "config.json") in told
    assert "\n" not in told


@pytest.mark.parametrize("role", ["base", "draft"])
def test_what_is_not_applied_is_told_of_the_base_alone(
    tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, role: str
) -> None:
    for file in tiny_base.iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "generation_config.json").write_text('{"top_p": 0.5}')
    build = verify_program.build if role == "base" else draft_program.build
    build(config(tmp_path), lambda text: None)
    assert caplog.text.count("top_p = 0.5") == (role == "base")


def test_a_folder_without_weights_is_told(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_base / "config.json", tmp_path)
    with pytest.raises(ConfigError, match="can't be loaded"):
        load_runner(config(tmp_path))


def test_an_arena_that_holds_nothing_is_told(tiny_base: Path) -> None:
    with pytest.raises(ConfigError, match=r"arena_bytes: 100 bytes .* at least \d+ are needed"):
        load_runner(config(tiny_base, arena_bytes=100))


def test_devices_that_are_not_there_are_told() -> None:
    assert choose_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="cuda:3; this machine has 0 CUDA devices"):
            choose_device("cuda:3")
    if not torch.backends.mps.is_available():
        with pytest.raises(ConfigError, match="mps"):
            choose_device("mps")


def test_dtype_is_float32_on_a_cpu_and_the_checkpoint_s_elsewhere() -> None:
    bfloat16 = SimpleNamespace(dtype="bfloat16")
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert choose_dtype("auto", bfloat16, cpu) == torch.float32
    assert choose_dtype("float16", bfloat16, cpu) == torch.float16
    assert choose_dtype("auto", SimpleNamespace(dtype=torch.float32), meta) == torch.float32
    assert choose_dtype("auto", SimpleNamespace(dtype=None), meta) == torch.float16


def test_bfloat16_checkpoints_run_in_bfloat16_where_asked(tiny_base: Path) -> None:
    loaded = load_runner(config(tiny_base, dtype="bfloat16"))
    assert loaded.facts.dtype == "bfloat16"
    assert {t.dtype for t in loaded.storage.tensors} == {torch.bfloat16}


def test_fingerprints_agree_for_one_vocabulary_whatever_the_padding(
    tiny_base: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    same = fingerprint(str(tiny_base), 320)
    assert same == fingerprint(str(tiny_draft), 384)
    assert len(same) == 64
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_base / name, tmp_path)
    other = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = other["model"]["vocab"]
    one, two = sorted(vocabulary, key=vocabulary.get)[5:7]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    assert fingerprint(str(tmp_path), 320) != same


def test_a_fingerprint_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    assert fingerprint(str(tmp_path), 97).startswith("size-only:")
    assert fingerprint(str(tmp_path), 97) == fingerprint("", 97) != fingerprint("", 98)
