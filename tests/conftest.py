"""Fixtures for all tests: a tiny random pair on disk, and processes that surely end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TINY_VOCABULARY = 320
TINY_TEXT = (
    "def add(left, right):\n    return left + right\n\n"
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n"
    "for index in range(10):\n    print(index, 'naïve café')\n"
) * 8


def write_tiny_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of ``TINY_VOCABULARY`` entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TINY_TEXT], trainer)
    assert tokenizer.get_vocab_size() == TINY_VOCABULARY
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"})
    )


def write_tiny_llama(folder: Path, *, layers: int, hidden: int, seed: int, **changes: Any) -> Path:
    """A random Llama with grouped queries in Hugging Face format, tokenizer included.

    Written by hand rather than through transformers, whose import takes seconds.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    heads, kv_heads, head_dim = 4, 2, hidden // 4
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "vocab_size": TINY_VOCABULARY,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    } | changes
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator) * 0.3

    tensors = {
        "model.embed_tokens.weight": weight(config["vocab_size"], hidden),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": weight(config["vocab_size"], hidden),
    }
    for layer in range(layers):
        at = f"model.layers.{layer}"
        tensors |= {
            f"{at}.input_layernorm.weight": torch.ones(hidden),
            f"{at}.post_attention_layernorm.weight": torch.ones(hidden),
            f"{at}.self_attn.q_proj.weight": weight(heads * head_dim, hidden),
            f"{at}.self_attn.k_proj.weight": weight(kv_heads * head_dim, hidden),
            f"{at}.self_attn.v_proj.weight": weight(kv_heads * head_dim, hidden),
            f"{at}.self_attn.o_proj.weight": weight(hidden, heads * head_dim),
            f"{at}.mlp.gate_proj.weight": weight(2 * hidden, hidden),
            f"{at}.mlp.up_proj.weight": weight(2 * hidden, hidden),
            f"{at}.mlp.down_proj.weight": weight(hidden, 2 * hidden),
        }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    write_tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def make_tiny_llama() -> Callable[..., Path]:
    """``write_tiny_llama``, for tests that need another shape."""
    return write_tiny_llama


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random base: two layers, grouped queries, 320 tokens."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "base", layers=2, hidden=64, seed=1)


@pytest.fixture(scope="session")
def tiny_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random draft with the same tokenizer."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "draft", layers=1, hidden=32, seed=2)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A private folder whose path is short enough for unix sockets."""
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="or-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts ``python -P -m MODULE ARGS…`` and kills what the test left of it."""
    running: list[subprocess.Popen[str]] = []

    def start(module: str, *args: str, env: dict[str, str] | None = None, **options: Any) -> Any:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("OUTRIDER_")}
        clean |= {"OMP_NUM_THREADS": "1"} | (env or {})
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *args],
            env=clean,
            text=True,
            start_new_session=True,
            **options,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


@pytest.fixture(scope="session")
def engines() -> Any:
    """The module tests/engines.py: tiny models and a loop over real engines."""
    return _helper("engines")


@pytest.fixture(scope="session")
def processors() -> Any:
    """The module tests/processors.py: distributions by transformers' own processors."""
    return _helper("processors")


@pytest.fixture(scope="session")
def fakes() -> Any:
    """The module tests/fakes.py: services over a toy model."""
    return _helper("fakes")


@pytest.fixture(scope="session")
def processes() -> Any:
    """The module tests/processes.py: what a process holds, and toys that can be killed."""
    return _helper("processes")


@pytest.fixture(scope="session")
def linked() -> Any:
    """The module tests/linked.py: a coordinator here over services that share memory."""
    return _helper("linked")


@pytest.fixture(scope="session")
def faults() -> Any:
    """The module tests/faults.py: services that share memory, harmed in mid-request."""
    return _helper("faults")


@pytest.fixture(scope="session")
def device() -> Any:
    """The module tests/device.py: a device played by the host."""
    return _helper("device")


def _helper(module: str) -> Any:
    """A module beside this file; no package, so that test folders shadow nothing."""
    import importlib.util

    name = f"outrider_test_{module}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{module}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
