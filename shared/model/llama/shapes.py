"""What every forward of the Llama block family derives from a model's configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from outrider.shared.core.model_facts import ModelFacts
from outrider.shared.kv.storage import Storage


def head_dim(config: Any) -> int:
    """Elements of one head, said or derived."""
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def positions_of(facts: ModelFacts, storage: Storage) -> int:
    """Positions that a row may have: no more than the arena holds, but rings hold any number."""
    if all(kind.window is not None for kind in storage.kinds):
        return facts.max_positions
    return max(1, min(facts.max_positions, max(p.tokens for p in storage.arena.pools)))


def rotary_table(model: Any, positions: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and signed sin, ``[positions, dim]`` each, from the model's own rotary module.

    In the type and on the device of ``like``. The first half of sin has its sign turned: a row is
    ``x * cos + roll(x, dim / 2) * sin``.
    """
    index = torch.arange(positions, device=like.device)[None]
    with torch.inference_mode():
        cos, sin = model.model.rotary_emb(like, index)
        signed = sin[0].clone()
        signed[:, : signed.shape[1] // 2].neg_()
        return cos[0].contiguous(), signed
