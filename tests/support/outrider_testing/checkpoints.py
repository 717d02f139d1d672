"""Random models on disk, in Hugging Face format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCABULARY = 320
_TEXT = (
    "def add(left, right):\n    return left + right\n\n"
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n"
    "for index in range(10):\n    print(index, 'naïve café')\n"
) * 8


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of ``VOCABULARY`` entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"})
    )


def write_llama(folder: Path, *, layers: int, hidden: int, seed: int, **changes: Any) -> Path:
    """A random Llama with grouped queries in Hugging Face format, tokenizer included.

    Written by hand rather than through transformers, whose import takes seconds.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    heads, kv_heads, head_dim = 4, 2, hidden // 4
    config: dict[str, Any] = {
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
        "vocab_size": VOCABULARY,
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
    write_tokenizer(folder)
    return folder
