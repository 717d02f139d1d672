"""Plain Llama checkpoints, read without transformers.

Importing transformers' modelling code takes some three seconds of processor time, in each model
process, before the first byte of weights is read. The fast path needs no more of it than the
weights and a few numbers of the configuration, so for the plainest checkpoints they are read
here, into modules with the names that transformers gives them. Whatever is not plain (another
architecture, scaled rotary embeddings, quantized weights, a hub id, odd tensor names) is left
to transformers.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from outrider.shared.model.hf.weight_files import weight_files

log = logging.getLogger(__name__)

_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": None,
    "mlp_bias": False,
}


class Rotary(nn.Module):
    """The default rotary embedding, computed as transformers computes it, bit for bit."""

    def __init__(self, dim: int, theta: float) -> None:
        super().__init__()
        self._frequencies = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each ``[batch, positions, dim]`` in ``x``'s type."""
        angles = positions[..., None].float() * self._frequencies.to(x.device)
        both = torch.cat((angles, angles), dim=-1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)


class LlamaForCausalLM(nn.Module):
    """The weights of one checkpoint, in modules named as transformers names them.

    It holds what ``LlamaRunner`` takes over; it has no forward of its own.
    """

    def __init__(self, config: Any, tensors: dict[str, Tensor], generation: dict[str, Any]) -> None:
        """Raises ``KeyError`` for a tensor that is missing, ``ValueError`` for one too many or of
        a wrong shape."""
        super().__init__()
        self.config = config
        self.generation_config = SimpleNamespace(eos_token_id=generation.get("eos_token_id"))
        hidden, inner = config.hidden_size, config.intermediate_size
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim

        def bare() -> Any:
            return nn.Module()

        def take(name: str, *shape: int) -> Any:
            tensor = tensors.pop(f"{name}.weight")
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name}.weight has shape {tuple(tensor.shape)}, not {shape}")
            module = bare()
            module.weight = nn.Parameter(tensor, requires_grad=False)
            module.bias = None
            return module

        self.model: Any = bare()
        self.model.embed_tokens = take("model.embed_tokens", config.vocab_size, hidden)
        self.model.layers = nn.ModuleList()
        for number in range(config.num_hidden_layers):
            at = f"model.layers.{number}"
            layer = bare()
            layer.input_layernorm = take(f"{at}.input_layernorm", hidden)
            layer.post_attention_layernorm = take(f"{at}.post_attention_layernorm", hidden)
            layer.self_attn = bare()
            layer.self_attn.q_proj = take(f"{at}.self_attn.q_proj", queries, hidden)
            layer.self_attn.k_proj = take(f"{at}.self_attn.k_proj", keys, hidden)
            layer.self_attn.v_proj = take(f"{at}.self_attn.v_proj", keys, hidden)
            layer.self_attn.o_proj = take(f"{at}.self_attn.o_proj", hidden, queries)
            layer.mlp = bare()
            layer.mlp.gate_proj = take(f"{at}.mlp.gate_proj", inner, hidden)
            layer.mlp.up_proj = take(f"{at}.mlp.up_proj", inner, hidden)
            layer.mlp.down_proj = take(f"{at}.mlp.down_proj", hidden, inner)
            self.model.layers.append(layer)
        self.model.norm = take("model.norm", hidden)
        self.model.rotary_emb = Rotary(config.head_dim, config.rope_theta)
        if config.tie_word_embeddings:
            own = tensors.pop("lm_head.weight", None)
            if own is not None and not torch.equal(own, self.model.embed_tokens.weight):
                raise ValueError("the output layer is said to be tied, and has weights of its own")
            self.lm_head = self.model.embed_tokens
        else:
            self.lm_head = take("lm_head", config.vocab_size, hidden)
        if tensors:
            raise ValueError(f"unknown tensor {min(tensors)}")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.embed_tokens.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        dtype: torch.dtype = self.model.embed_tokens.weight.dtype
        return dtype

    def get_output_embeddings(self) -> Any:
        """The output layer."""
        return self.lm_head


def load_plain(path: str, choose_dtype: Any, device: torch.device) -> LlamaForCausalLM | None:
    """The checkpoint in the folder ``path``, or None where it is not plain.

    ``choose_dtype(config)`` gives the type of the weights.
    """
    folder = Path(path)
    try:
        fields = json.loads((folder / "config.json").read_text("utf-8"))
        config = _plain_config(fields)
        if config is None:
            return None
        generation_file = folder / "generation_config.json"
        generation = (
            json.loads(generation_file.read_text("utf-8")) if generation_file.is_file() else {}
        )
        tensors = _tensors(folder, choose_dtype(config), device)
        return None if tensors is None else LlamaForCausalLM(config, tensors, generation)
    except Exception as error:
        # transformers knows more forms, and has the better message where it does not either.
        log.debug("%s is left to transformers: %s", path, error)
        return None


def _plain_config(fields: dict[str, Any]) -> Any | None:
    """Attributes as transformers' configuration has them; None where something is not plain."""
    if fields.get("model_type") != "llama" or fields.get("architectures") != ["LlamaForCausalLM"]:
        return None
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", fields.get("rope_theta", 10000.0))
    if (
        rope_type != "default"
        or rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0)) != 1.0
        or fields.get("attention_bias")
        or fields.get("quantization_config") is not None
        or fields.get("layer_types")
        or fields.get("hidden_act", "silu") not in ("silu", "swish")
        or fields.get("mlp_bias")
    ):
        return None
    values = _DEFAULTS | fields
    heads = values["num_attention_heads"]
    values["num_key_value_heads"] = values.get("num_key_value_heads") or heads
    values["head_dim"] = values.get("head_dim") or values["hidden_size"] // heads
    values["rope_theta"] = float(theta)
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": float(theta)}
    values["dtype"] = values.get("dtype") or values.get("torch_dtype")
    config = SimpleNamespace(**values)
    config.get_text_config = lambda decoder=True: config
    return config


def _tensors(folder: Path, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor] | None:
    """All weights, converted and on their device; None where they are not safetensors."""
    from safetensors import safe_open

    files = weight_files(folder)
    if not files or any(file.suffix != ".safetensors" for file in files):
        return None
    tensors: dict[str, Tensor] = {}
    for one in files:
        with safe_open(str(one), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                tensor = file.get_tensor(key)
                if not tensor.is_floating_point():
                    return None
                # A copy: what is mapped from the file is seldom aligned for fast products.
                tensors[key] = tensor.to(device=device, dtype=dtype, copy=True)
    return tensors
