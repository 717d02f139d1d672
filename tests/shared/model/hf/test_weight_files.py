"""Files that are not whole, or not what the configuration says, are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from outrider.shared.config.schema import ModelConfig
from outrider.shared.core.errors import ConfigError
from outrider.shared.model.hf.loading import refusal
from outrider.shared.model.loading import load_runner
from outrider.shared.model.runner import Runner, Span
from outrider_testing import engines
from outrider_testing.architectures import ARCHITECTURES, tiny

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def load(folder: Path, runner: str = "auto") -> Runner:
    return load_runner(
        ModelConfig(path=str(folder), device="cpu", arena_bytes=4 << 20, runner=runner)
    )


def logits_of(mine: Runner) -> torch.Tensor:
    with torch.inference_mode():
        return mine.forward([Span(mine.arena.admit(40), 0, [5, 6, 7, 8], 4)])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one file, its output layer not tied."""
    folder = tmp_path_factory.mktemp("saved")
    engines.tiny_llama(1, tie_word_embeddings=False).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def change(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    held = load_file(file)
    edit(held)
    save_file(held, file, {"format": "pt"})


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda file: file.write_text(POINTER), "pointer of Git LFS"),
        (lambda file: file.write_bytes(b""), "is empty"),
        (lambda file: cut(file, 5), "is cut off within its header"),
        (lambda file: cut(file, 100), "is cut off within its header"),
        (lambda file: cut(file, file.stat().st_size - 1), "is cut off: "),
        (lambda file: file.write_bytes(b"\x08" + bytes(7) + b"no json!"), "not one of safetensors"),
    ],
)
def test_weight_files_that_are_not_whole_are_refused_by_name(
    copy: Path, harm: Callable[[Path], object], says: str
) -> None:
    file = copy / "model.safetensors"
    harm(file)
    with pytest.raises(ConfigError, match=says) as error:
        load(copy)
    assert str(file) in str(error.value)


def test_weight_files_that_an_index_names_must_be_there(tmp_path: Path) -> None:
    engines.tiny_llama(1).save_pretrained(tmp_path, max_shard_size="40KB")
    *_, last = sorted(tmp_path.glob("*.safetensors"))
    cut(last, last.stat().st_size - 8)
    with pytest.raises(ConfigError, match=f"{last.name} is cut off"):
        load(tmp_path)
    last.unlink()
    with pytest.raises(ConfigError, match=f"{last.name} is not there, but .*index.json names it"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(POINTER)
    with pytest.raises(ConfigError, match=r"index\.json is a pointer of Git LFS"):
        load(tmp_path)


@pytest.mark.parametrize("runner", ["auto", "generic"])
def test_weights_in_one_file_go_before_an_index(copy: Path, runner: str) -> None:
    """As transformers has it: other weights in shards beside them are not looked at."""
    other = engines.tiny_llama(2, tie_word_embeddings=False)
    other.save_pretrained(copy / "shards", max_shard_size="40KB")
    before = logits_of(load(copy, runner))
    for file in (copy / "shards").glob("*safetensors*"):
        shutil.copy(file, copy / file.name)
    assert (copy / "model.safetensors.index.json").is_file()
    assert torch.equal(logits_of(load(copy, runner)), before)


@pytest.mark.parametrize("runner", ["auto", "generic"])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_tensors_that_are_missing_are_refused_by_name(copy: Path, runner: str, name: str) -> None:
    tensors(copy, lambda held: held.pop(name))
    with pytest.raises(ConfigError, match=f"the files lack the tensor {name}"):
        load(copy, runner)


@pytest.mark.parametrize("runner", ["auto", "generic"])
def test_tensors_without_a_place_are_refused_by_name(copy: Path, runner: str) -> None:
    tensors(copy, lambda held: held.update({"model.layers.0.gate": torch.zeros(3)}))
    with pytest.raises(ConfigError, match=r"the files have the tensor model\.layers\.0\.gate"):
        load(copy, runner)


@pytest.mark.parametrize("runner", ["auto", "generic"])
def test_tensors_of_another_shape_are_refused(copy: Path, runner: str) -> None:
    change(copy, intermediate_size=80)
    with pytest.raises(ConfigError, match=r"the files have 6 tensors model.* in another shape"):
        load(copy, runner)


def test_pickles_that_are_cut_off_are_refused_by_name(copy: Path) -> None:
    file = copy / "pytorch_model.bin"
    torch.save(load_file(copy / "model.safetensors"), file)
    (copy / "model.safetensors").unlink()
    assert load(copy).facts.parameters
    cut(file, file.stat().st_size // 2)
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin is cut off"):
        load(copy)


def test_a_tokenizer_that_can_not_be_read_leaves_the_model_to_serve(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    assert load(copy).facts.vocab_fingerprint.startswith("size-only:")


@pytest.mark.parametrize("runner", ["auto", "generic"])
def test_buffers_that_are_computed_need_no_place(copy: Path, runner: str) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors(copy, lambda held: held.update({name: torch.ones(4)}))
    assert load(copy, runner).facts.parameters


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("codegen", ["transformer.h.1.attn.causal_mask"]),
        ("gptj", ["transformer.h.1.attn.bias", "transformer.h.1.attn.masked_bias"]),
        ("gpt2", ["transformer.h.1.attn.bias", "transformer.h.1.attn.masked_bias"]),
        ("gpt_neo", ["transformer.h.1.attn.attention.masked_bias"]),
        (
            "gpt_neox",
            [
                "gpt_neox.layers.1.attention.bias",
                "gpt_neox.layers.1.attention.masked_bias",
                "gpt_neox.layers.1.attention.rotary_emb.inv_freq",
                "gpt_neox.layers.1.attention.rotary_emb.cos_cached",
            ],
        ),
        ("llama", ["model.layers.1.self_attn.rotary_emb.sin_cached"]),
        ("bloom", ["transformer.h.1.self_attention.scale_mask_softmax.causal_mask"]),
        ("falcon", ["transformer.h.1.self_attention.maybe_rotary.inv_freq"]),
        ("opt", ["model.decoder.version"]),
    ],
)
def test_buffers_of_published_checkpoints_need_no_place(
    kind: str, names: list[str], tmp_path: Path
) -> None:
    model = tiny(*ARCHITECTURES["GPT-Neo"]) if kind == "gpt_neo" else tiny(kind, {})
    model.save_pretrained(tmp_path)
    before = logits_of(load(tmp_path))
    tensors(tmp_path, lambda held: held.update({name: torch.ones(1) for name in names}))
    assert torch.equal(logits_of(load(tmp_path)), before)


@pytest.mark.parametrize("name", ["attn.out_proj.bias", "mlp.bias", "attn.mask"])
def test_weights_that_are_named_like_buffers_need_a_place(name: str, tmp_path: Path) -> None:
    tiny("codegen", {}).save_pretrained(tmp_path)
    tensors(tmp_path, lambda held: held.update({f"transformer.h.1.{name}": torch.zeros(3)}))
    with pytest.raises(ConfigError, match=rf"the files have the tensor transformer\.h\.1\.{name}"):
        load(tmp_path)


@pytest.mark.parametrize("runner", ["auto", "generic"])
def test_a_head_of_its_own_is_not_tied(copy: Path, runner: str) -> None:
    """As transformers has it, whatever the configuration says."""
    from transformers import AutoModelForCausalLM

    change(copy, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32).eval()
    mine = load(copy, runner)
    extent = mine.arena.admit(40)
    tokens = [5, 6, 7, 8]
    with torch.inference_mode():
        logits = mine.forward([Span(extent, 0, tokens, 4)])
        wanted = model(torch.tensor([tokens])).logits[0]
    assert torch.allclose(logits, wanted, atol=1e-4)


@pytest.mark.parametrize("changes", [{"hidden_act": "gelu"}, {"mlp_bias": True}])
def test_what_the_fast_path_can_not_do_goes_the_other_way(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    model = engines.tiny_llama(1, **changes)
    model.save_pretrained(tmp_path)
    mine = load(tmp_path)
    assert mine.facts.runner == "generic"
    extent = mine.arena.admit(40)
    with torch.inference_mode():
        logits = mine.forward([Span(extent, 0, [5, 6, 7], 3)])
        assert torch.allclose(logits, model(torch.tensor([[5, 6, 7]])).logits[0], atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt_neox_japanese"])
def test_decoders_whose_configuration_says_no_are_believed_by_what_they_do(kind: str) -> None:
    changes = {} if kind == "gpt_neox" else {"intermediate_multiple_size": 2}
    model = tiny(kind, changes)
    assert model.config.is_decoder is False
    assert refusal(model.config) is None
    assert refusal(model.config, model) is None


@pytest.mark.parametrize("kind", ["bert", "big_bird", "rembert", "xmod", "roformer"])
def test_encoders_are_refused_by_what_they_do(kind: str) -> None:
    model = tiny(kind, {"type_vocab_size": 2})
    assert "is an encoder" in str(refusal(model.config, model))
