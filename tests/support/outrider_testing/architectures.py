"""The decoder-only architectures that are served, each as a tiny random model."""

from __future__ import annotations

from typing import Any

WINDOW = 8
"""Of layers with a sliding window."""
MIXED = ["sliding_attention", "full_attention"]

# What makes a model small, set where its configuration has such a field.
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "n_embd": 32,
    "n_layer": 2,
    "n_layers": 2,
    "n_head": 4,
    "n_heads": 4,
    "n_positions": 128,
    "d_model": 32,
    "ffn_dim": 48,
    "n_inner": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "sliding_window": WINDOW,
    "rotary_dim": 8,
    "initializer_range": 0.3,
    "init_std": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}

# Name in the table -> (model type of transformers, changes to SMALL).
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "AFMoE": ("afmoe", {"layer_types": MIXED, "global_attn_every_n_layers": 2}),
    "Apertus": ("apertus", {}),
    "Arcee": ("arcee", {}),
    "Aria (text)": ("aria_text", {}),
    "BioGPT": ("biogpt", {}),
    "BitNet": ("bitnet", {}),
    "BLOOM (ALiBi)": ("bloom", {}),
    "CodeGen": ("codegen", {}),
    "Cohere": ("cohere", {}),
    "Cohere 2": ("cohere2", {"layer_types": MIXED}),
    "Cohere 2 MoE": ("cohere2_moe", {"layer_types": MIXED}),
    "CTRL": ("ctrl", {"dff": 48}),
    "DeepSeek V2 (latent attention)": ("deepseek_v2", LATENT),
    "DeepSeek V3 (latent attention)": ("deepseek_v3", LATENT),
    "DiffLlama": ("diffllama", {}),
    "Doge": ("doge", {}),
    "dots.llm1": ("dots1", {}),
    "ERNIE 4.5": ("ernie4_5", {}),
    "ERNIE 4.5 MoE": ("ernie4_5_moe", {}),
    "EXAONE 4": ("exaone4", {"layer_types": MIXED}),
    "Falcon": ("falcon", {"num_kv_heads": 1, "ffn_hidden_size": 48}),
    "Falcon (ALiBi)": ("falcon", {"alibi": True, "num_kv_heads": 1, "ffn_hidden_size": 48}),
    "Falcon (new decoder)": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 48},
    ),
    "FlexOLMo": ("flex_olmo", {}),
    "Gemma": ("gemma", {}),
    "Gemma 2": ("gemma2", {"layer_types": MIXED, "query_pre_attn_scalar": 8}),
    "Gemma 3 (text)": ("gemma3_text", {"layer_types": MIXED, "query_pre_attn_scalar": 8}),
    "GLM": ("glm", {}),
    "GLM 4": ("glm4", {}),
    "GLM 4 MoE": ("glm4_moe", {}),
    "GLM 4 MoE Lite (latent attention)": ("glm4_moe_lite", LATENT),
    "GPT-2": ("gpt2", {}),
    "GPT-BigCode": ("gpt_bigcode", {}),
    "GPT-J": ("gptj", {}),
    "GPT-Neo": (
        "gpt_neo",
        {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    ),
    "GPT-NeoX": ("gpt_neox", {}),
    "GPT-NeoX Japanese": ("gpt_neox_japanese", {"intermediate_multiple_size": 2}),
    "gpt-oss (sinks)": ("gpt_oss", {"layer_types": MIXED}),
    "Granite": ("granite", {}),
    "Granite MoE": ("granitemoe", {}),
    "Granite MoE shared": ("granitemoeshared", {}),
    "Helium": ("helium", {}),
    "HunYuan dense": ("hunyuan_v1_dense", {}),
    "HunYuan MoE": ("hunyuan_v1_moe", {}),
    "HyperCLOVA X": ("hyperclovax", {}),
    "JetMoE": ("jetmoe", {"kv_channels": 8}),
    "Llama": ("llama", {}),
    "Llama (Llama-3 rotary)": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "MiMo V2 Flash": ("mimo_v2_flash", {"layer_types": MIXED}),
    "MiniCPM 3 (latent attention)": ("minicpm3", LATENT),
    "MiniMax M2": ("minimax_m2", {}),
    "Ministral": ("ministral", {"layer_types": MIXED}),
    "Mistral": ("mistral", {}),
    "Mixtral": ("mixtral", {}),
    "MPT (ALiBi)": ("mpt", {}),
    "nanochat": ("nanochat", {}),
    "Nemotron": ("nemotron", {}),
    "OLMo": ("olmo", {}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", {"layer_types": MIXED}),
    "OLMoE": ("olmoe", {}),
    "OPT": ("opt", {"word_embed_proj_dim": 32}),
    "Persimmon": ("persimmon", {}),
    "Phi": ("phi", {}),
    "Phi-3": ("phi3", {}),
    "Phi-3.5 MoE": ("phimoe", {}),
    "Qwen2": ("qwen2", {}),
    "Qwen2 (mixed windows)": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": MIXED},
    ),
    "Qwen2 MoE": ("qwen2_moe", {}),
    "Qwen3": ("qwen3", {}),
    "Qwen3 MoE": ("qwen3_moe", {}),
    "Seed-OSS": ("seed_oss", {}),
    "SmolLM3": ("smollm3", {}),
    "StableLM": ("stablelm", {}),
    "Starcoder2": ("starcoder2", {"sliding_window": WINDOW}),
    "VaultGemma": ("vaultgemma", {"layer_types": MIXED, "query_pre_attn_scalar": 8}),
    "XGLM": ("xglm", {"attention_heads": 4}),
    "Youtu-LLM (latent attention)": ("youtu", LATENT),
}


BORDER = 24
"""Tokens of a sequence beyond which ``LENGTHS`` take other factors."""
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.05, 1.1, 1.2],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": BORDER,
}
# Models that decode otherwise once a sequence is long.
LENGTHS: dict[str, tuple[str, dict[str, Any]]] = {
    "Phi-3 (longrope)": (
        "phi3",
        {"original_max_position_embeddings": BORDER, "rope_parameters": _LONG},
    ),
    "Phi-MoE (longrope)": (
        "phimoe",
        {
            "original_max_position_embeddings": BORDER,
            "rope_parameters": _LONG | {"short_mscale": 1.1, "long_mscale": 1.6},
        },
    ),
    "Llama (longrope)": ("llama", {"rope_parameters": _LONG}),
}


def tiny(kind: str, changes: dict[str, Any], seed: int = 0) -> Any:
    """A random model of a kind, a few ten thousand parameters, float32; no end-of-sequence ids."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    fields = CONFIG_MAPPING[kind]
    plain = fields().to_dict()
    chosen = {name: value for name, value in SMALL.items() if name in plain}
    if plain.get("sliding_window") is None:
        chosen.pop("sliding_window", None)
    if kind == "mistral":
        chosen["sliding_window"] = WINDOW
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(fields(**(chosen | changes))).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.bos_token_id = None
    return model
