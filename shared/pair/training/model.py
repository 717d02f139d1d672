"""A compact Llama, with the parameter names and arithmetic of Hugging Face's.

Source: Touvron et al. 2023 (Llama), Su et al. 2021 (rotary positions), Ainslie et al. 2023
(grouped-query attention).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The sizes of one model. Embedding and output weights are tied."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int = 8192
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0


BASE = Shape(384, 8, 6, 2, 64, 640)
DRAFT = Shape(160, 2, 4, 2, 64, 384)


def rope_tables(shape: Shape, device) -> tuple[Tensor, Tensor]:
    """cos and sin, each float32 [max_positions, head_dim] (both halves alike)."""
    powers = torch.arange(0, shape.head_dim, 2, dtype=torch.float32, device=device) / shape.head_dim
    angles = (
        torch.arange(shape.max_position_embeddings, dtype=torch.float32, device=device)[:, None]
        / shape.rope_theta**powers
    )
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [..., head_dim]; cos and sin broadcast against it."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        self.q_proj = nn.Linear(s.hidden_size, s.num_attention_heads * s.head_dim, bias=False)
        self.k_proj = nn.Linear(s.hidden_size, s.num_key_value_heads * s.head_dim, bias=False)
        self.v_proj = nn.Linear(s.hidden_size, s.num_key_value_heads * s.head_dim, bias=False)
        self.o_proj = nn.Linear(s.num_attention_heads * s.head_dim, s.hidden_size, bias=False)

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [batch, length, hidden] to q, k, v [batch, heads, length, head_dim], rotated."""
        b, t, _ = x.shape
        q, k, v = (
            p(x).view(b, t, -1, self.shape.head_dim).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kept: list | None) -> Tensor:
        q, k, v = self.qkv(x, cos, sin)
        if kept is not None:
            kept.append((k, v))
        repeat = self.shape.num_attention_heads // self.shape.num_key_value_heads
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))


class MLP(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden_size, s.intermediate_size, bias=False)
        self.up_proj = nn.Linear(s.hidden_size, s.intermediate_size, bias=False)
        self.down_proj = nn.Linear(s.intermediate_size, s.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(s), MLP(s)
        self.input_layernorm = RMSNorm(s.hidden_size, s.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(s.hidden_size, s.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kept: list | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, kept)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(s.vocab_size, s.hidden_size)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.num_hidden_layers))
        self.norm = RMSNorm(s.hidden_size, s.rms_norm_eps)


class Llama(nn.Module):
    """The whole model. Weights are float32; activations take `dtype` (autocast when bf16)."""

    def __init__(self, shape: Shape, device="cpu", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self.model = Body(shape)
        depth = (2 * shape.num_hidden_layers) ** -0.5
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(
                    p,
                    std=0.02
                    * (depth if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0),
                )
        self.to(device)
        cos, sin = rope_tables(shape, device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor, kept: list | None = None) -> Tensor:
        """Logits [batch, length, vocab] of ids [batch, length]; `kept` collects (k, v) by layer."""
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            x = self.model.embed_tokens(ids).to(self.dtype)
            cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
            for layer in self.model.layers:
                x = layer(x, cos, sin, kept)
            return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


def save(model: Llama, out: Path) -> None:
    """Writes config.json, generation_config.json and model.safetensors (bf16) to `out`."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    s = asdict(model.shape)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **s,
        "rope_parameters": {"rope_type": "default", "rope_theta": s["rope_theta"]},
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}, indent=2) + "\n"
    )
    weights = {
        name: p.detach().to(torch.bfloat16).cpu().contiguous()
        for name, p in model.named_parameters()
    }
    save_file(weights, str(out / "model.safetensors"), metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)


def load(folder: Path, device="cpu", dtype: torch.dtype = torch.float32) -> Llama:
    """Reads a folder written by `save`; the bf16 weights are widened to float32."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    model = Llama(
        Shape(**{name: config[name] for name in Shape.__dataclass_fields__}), device, dtype
    )
    model.load_state_dict(
        {name: w.float() for name, w in load_file(str(folder / "model.safetensors")).items()},
        strict=True,
    )
    return model
