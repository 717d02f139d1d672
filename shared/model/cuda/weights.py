"""The weights of a Llama-family model as the kernels want them: views, never copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from outrider.kernels.attention_shapes import Heads
from outrider.shared.kv.storage import Storage


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Weights of one block, [columns out, columns in]; q, k, v and gate, up stacked.

    ``keys``, ``values``: the layer's part of the arena, [tokens, kv_heads, head_dim], in the
    arena's pool ``pool``.
    """

    input_norm: Tensor
    qkv: Tensor
    output: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor
    keys: Tensor
    values: Tensor
    heads: Heads
    pool: int = 0
    qkv_bias: Tensor | None = None
    output_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of a model; ``head`` may be the same tensor as ``embedding``.

    ``rope``: float32 [positions, head_dim / 2, 2], see ``kernels.attention.rope_table``.
    """

    embedding: Tensor
    layers: Sequence[LayerWeights]
    norm: Tensor
    head: Tensor
    rope: Tensor
    eps: float


def weights_of(
    model: Any, blocks: Sequence[Any], storage: Storage, heads: tuple[int, int, int], positions: int
) -> Weights:
    """``blocks``: LlamaRunner's, with fused projections. ``heads``: (query heads, KV heads, size of
    a head). ``positions``: how far the rotary table goes."""
    layers = []
    for number, (block, layer) in enumerate(zip(blocks, model.model.layers, strict=True)):
        pool = storage.arena.pools[storage.pool_of[number]]
        window = block.window or 0
        layers.append(
            LayerWeights(
                input_norm=layer.input_layernorm.weight.data,
                qkv=block.qkv,
                output=block.out.data,
                post_norm=layer.post_attention_layernorm.weight.data,
                gate_up=block.gate_up,
                down=block.down.data,
                keys=storage.layer_keys[number],
                values=storage.layer_values[number],
                heads=Heads(*heads, window, window + pool.slack if window else 0),
                pool=storage.pool_of[number],
                qkv_bias=block.qkv_bias,
                output_bias=None if block.out_bias is None else block.out_bias.data,
                q_norm=_norm(layer.self_attn, "q_norm"),
                k_norm=_norm(layer.self_attn, "k_norm"),
            )
        )
    # In float32: what the model's own module gives is rounded to the model's type.
    probe = torch.zeros(1, device=storage.device)
    index = torch.arange(positions, device=storage.device)[None]
    with torch.inference_mode():
        cos, sin = model.model.rotary_emb(probe, index)
    half = heads[2] // 2
    rope = torch.stack((cos[0, :, :half], sin[0, :, :half]), -1).float().contiguous()
    return Weights(
        embedding=model.model.embed_tokens.weight.data,
        layers=layers,
        norm=model.model.norm.weight.data,
        head=model.lm_head.weight.data,
        rope=rope.clone(),
        eps=model.config.rms_norm_eps,
    )


def _norm(module: Any, name: str) -> Tensor | None:
    found = getattr(module, name, None)
    return None if found is None else found.weight.data
