"""Hugging Face publishes a package named ``kernels``, as one of our folders is named."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys
sys.path.insert(0, "")  # as `python -c` and notebooks do: the working folder comes first
from pathlib import Path
import torch
import kernels
assert Path(kernels.__file__).parent != Path.cwd() / "kernels", kernels.__file__
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers import integrations
from transformers.integrations import hub_kernels
llama = LlamaForCausalLM(LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32))
gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=32, n_embd=16, n_layer=1, n_head=2))
for model in (llama, gpt2):
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 32)
import outrider.kernels
assert list(outrider.kernels.__path__), outrider.kernels
print("fine")
"""


def test_kernels_folder_leaves_transformers_working() -> None:
    importlib.metadata.version("kernels")  # the real one, a test dependency
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("fine")
