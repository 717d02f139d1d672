"""The fast path for the Llama block family: the forward written out, over fused weights.

The block is: norm, fused q/k/v projection, rotary embedding, attention over the arena, output
projection, residual; norm, fused gate/up projection, gated activation, down projection,
residual. Llama, Mistral, Qwen2 (biased q/k/v) and Qwen3 (norms on queries and keys) share it.

A model of a few million parameters spends more time between its matrix products than in them, so
the path does as few tensor operations as it can. On a CPU it runs where the compiled forward
(``shared/model/cpu``) can't.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from outrider.shared.core.model_facts import ModelFacts
from outrider.shared.kv.storage import Storage
from outrider.shared.model.attention import attend, fold_mask
from outrider.shared.model.llama.linear import RmsNorm, fuse
from outrider.shared.model.llama.shapes import head_dim, positions_of, rotary_table
from outrider.shared.model.packing import PackedSpan, pack
from outrider.shared.model.runner import Runner, Span

FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")


def why_not(model: Any) -> str | None:
    """Why this path can't run ``model``; None where it can."""
    config = model.config
    name = type(model).__name__
    if name not in FAMILY:
        return f"{name} is not of the Llama block family ({', '.join(FAMILY)})"
    packed = any(type(p.data) is not Tensor for p in model.parameters())
    if packed or getattr(config, "quantization_config", None) is not None:
        return "its weights are quantized"
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is {config.hidden_act}"
    if getattr(config, "mlp_bias", False):
        return "its gated layers have biases"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in _STATIC_ROPE:
        return f"its rotary embedding ({rope}) depends on the length of the sequence"
    if any(
        p.dtype not in (torch.float32, torch.float16, torch.bfloat16) for p in model.parameters()
    ):
        return "its weights are not of one floating type"
    return None


@dataclass(slots=True)
class _Block:
    """The tensors of one layer; ``window`` as in ``LayerKind``."""

    norm: RmsNorm
    qkv: Tensor
    qkv_bias: Tensor | None
    query_norm: RmsNorm | None
    key_norm: RmsNorm | None
    out: Tensor
    out_bias: Tensor | None
    mlp_norm: RmsNorm
    gate_up: Tensor
    down: Tensor
    window: int | None


@dataclass(slots=True)
class _Place:
    """One span's rows, and its places in the KV tensors: per pool, per layer of the pool."""

    begin: int
    end: int
    causal: bool
    masks: list[Tensor | None]
    targets: list[list[list[Tensor]]]
    views: list[list[list[tuple[Tensor, Tensor]]]]


class LlamaRunner(Runner):
    """Forwards a model of the Llama block family; see ``why_not`` for which."""

    def __init__(self, model: Any, facts: ModelFacts, storage: Storage) -> None:
        """Takes over the weights of ``model`` (a transformers module): fused in place, the
        module's parameters become slices of the fused tensors, so there is no second copy."""
        super().__init__(facts, storage)
        config = model.config
        self._model = model
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        self._dim: int = head_dim(config)
        self._scale = self._dim**-0.5
        self._group = self._heads // self._kv_heads
        self._half: int = config.intermediate_size
        self._embedding: Tensor = model.model.embed_tokens.weight
        self._head: Tensor = model.lm_head.weight
        self._blocks = [
            _block(layer, config, kind.window)
            for layer, kind in zip(model.model.layers, storage.layers, strict=True)
        ]
        self._norm = RmsNorm(model.model.norm, config.rms_norm_eps)
        cos, sin = rotary_table(model, positions_of(facts, storage), self._embedding)
        self._cos, self._sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def _forward(self, spans: Sequence[Span]) -> Tensor:
        device = self.storage.device
        works = pack(self.storage, spans)
        ids = [token for span in spans for token in span.tokens]
        wanted = [row for work in works for row in range(work.end - work.span.wanted, work.end)]
        rows = len(ids)
        index = torch.tensor(ids, device=device)
        hidden = functional.embedding(index, self._embedding)
        rotation = self._rotation(works, rows)
        places = [self._place(work) for work in works]
        blended = hidden.new_zeros(rows, self._heads, self._dim)
        for layer, block in enumerate(self._blocks):
            self._attention(layer, block, hidden, rotation, places, blended)
            self._feed_forward(block, hidden)
        if len(wanted) == rows:
            picked = hidden
        elif not wanted:
            return hidden.new_zeros(0, self.facts.vocab_size)
        else:
            picked = hidden.index_select(0, torch.tensor(wanted, device=device))
        return functional.linear(self._norm(picked), self._head)

    def _place(self, work: PackedSpan) -> _Place:
        storage, pools = self.storage, range(len(self.storage.kinds))
        return _Place(
            work.begin,
            work.end,
            work.causal,
            [fold_mask(m, work.end - work.begin, self._group) for m in work.masks],
            [storage.all_targets(pool, work.writes[pool]) for pool in pools],
            [storage.all_views(pool, work.reads[pool]) for pool in pools],
        )

    def _rotation(self, works: Sequence[PackedSpan], rows: int) -> tuple[Tensor, Tensor]:
        """cos and signed sin of every row, ``[rows, 1, dim]``."""
        if len(works) == 1:
            start = works[0].span.start
            return self._cos[start : start + rows], self._sin[start : start + rows]
        places: list[int] = []
        for work in works:
            places.extend(range(work.span.start, work.span.start + work.end - work.begin))
        index = torch.tensor(places, device=self.storage.device)
        return self._cos.index_select(0, index), self._sin.index_select(0, index)

    def _attention(
        self,
        layer: int,
        block: _Block,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        places: Sequence[_Place],
        blended: Tensor,
    ) -> None:
        """Adds the attention of one layer to ``hidden`` in place."""
        heads, kv_heads, dim = self._heads, self._kv_heads, self._dim
        qkv = functional.linear(block.norm(hidden), block.qkv, block.qkv_bias).contiguous()
        qkv = qkv.view(-1, heads + 2 * kv_heads, dim)
        turned = qkv[:, : heads + kv_heads]
        if block.query_norm is not None and block.key_norm is not None:
            turned[:, :heads] = block.query_norm(turned[:, :heads])
            turned[:, heads:] = block.key_norm(turned[:, heads:])
        swapped = turned.roll(dim // 2, -1)
        turned.mul_(rotation[0]).addcmul_(swapped, rotation[1])
        pool, number = self.storage.pool_of[layer], self.storage.place_of[layer]
        # [heads, rows, dim] and [2, rows, kv_heads, dim].
        queries = qkv[:, :heads].transpose(0, 1)
        fresh = qkv[:, heads:].unflatten(1, (2, kv_heads)).transpose(0, 1)
        for place in places:
            row = place.begin
            for target in place.targets[pool][number]:
                count = target.shape[1]
                target.copy_(fresh[:, row : row + count])
                row += count
            mixed = attend(
                queries[:, place.begin : place.end].unsqueeze(0),
                place.views[pool][number],
                place.masks[pool],
                scale=self._scale,
                causal=place.causal,
            )
            blended[place.begin : place.end].copy_(mixed[0].transpose(0, 1))
        flat = blended.view(-1, heads * dim)
        hidden.add_(functional.linear(flat, block.out, block.out_bias))

    def _feed_forward(self, block: _Block, hidden: Tensor) -> None:
        """Adds the gated layers of one block to ``hidden`` in place."""
        both = functional.linear(block.mlp_norm(hidden), block.gate_up)
        gate = functional.silu(both[:, : self._half]).mul_(both[:, self._half :])
        hidden.add_(functional.linear(gate.contiguous(), block.down))


def _block(layer: Any, config: Any, window: int | None) -> _Block:
    attention, mlp, eps = layer.self_attn, layer.mlp, config.rms_norm_eps
    qkv, qkv_bias = fuse([attention.q_proj, attention.k_proj, attention.v_proj])
    gate_up, _ = fuse([mlp.gate_proj, mlp.up_proj])
    query_norm = getattr(attention, "q_norm", None)
    key_norm = getattr(attention, "k_norm", None)
    return _Block(
        norm=RmsNorm(layer.input_layernorm, eps),
        qkv=qkv,
        qkv_bias=qkv_bias,
        query_norm=RmsNorm(query_norm, eps) if query_norm is not None else None,
        key_norm=RmsNorm(key_norm, eps) if key_norm is not None else None,
        out=attention.o_proj.weight,
        out_bias=attention.o_proj.bias,
        mlp_norm=RmsNorm(layer.post_attention_layernorm, eps),
        gate_up=gate_up,
        down=mlp.down_proj.weight,
        window=window,
    )
