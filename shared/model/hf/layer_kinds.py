"""Finds out what the layers of a transformers model cache, by forwarding one token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from outrider.shared.core.errors import ConfigError
from outrider.shared.kv.storage import LayerKind


class _Recorder(DynamicCache):
    """A cache that notes the shapes of what each layer stores."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.seen: dict[int, tuple[int, int, int]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.seen[layer_idx] = (key_states.shape[1], key_states.shape[3], value_states.shape[3])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def layer_kinds(model: Any) -> tuple[list[LayerKind], dict[int, int]]:
    """What each layer of ``model`` caches, found by forwarding one token.

    Returns the kinds, and the model's layer index -> place among them. Needs no knowledge of
    the architecture: heads and sizes are those that arrive, windows those that transformers
    gives its own cache. Raises ``ConfigError`` where some layer's state is not keys and values.
    """
    config = model.config.get_text_config(decoder=True)
    try:
        recorder = _Recorder(config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"its cache has layers of an unknown kind: {error}") from error
    for layer in recorder.layers:
        check_layer(layer)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.inference_mode():
        model(input_ids=token, past_key_values=recorder, use_cache=True)
    if not recorder.seen:
        raise ConfigError("its layers store no keys and values in transformers' cache")
    kinds, index = [], {}
    for place, number in enumerate(sorted(recorder.seen)):
        heads, key_dim, value_dim = recorder.seen[number]
        window = getattr(recorder.layers[number], "sliding_window", None)
        kinds.append(LayerKind(heads, key_dim, value_dim, window))
        index[number] = place
    return kinds, index


def check_layer(layer: Any) -> None:
    """Raises ``ConfigError`` where a layer of transformers' own cache is not plain keys and
    values of full or sliding-window attention."""
    name = type(layer).__name__
    if name == "DummyLayer":
        raise ConfigError("a layer reads the keys and values of another layer")
    if name not in ("DynamicLayer", "DynamicSlidingWindowLayer"):
        raise ConfigError(
            f"a layer's state is a {name}, not keys and values of full or sliding-window attention"
        )
