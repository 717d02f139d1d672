"""The rows of many sequences in one forward of a transformers model.

``PackedCache.update`` writes each sequence's rows to its extent, and an attention function of our
own, put into transformers' attention registry, reads them from there. No mask is made: the registry
of mask functions does not know our name.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from outrider.shared.core.errors import ConfigError
from outrider.shared.kv.storage import Storage
from outrider.shared.model.attention import attend
from outrider.shared.model.packing import PackedSpan


class Blind(CacheLayerMixin):
    """Stands where a model looks at a layer's length; the packed rows have none in common."""

    is_sliding = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is allocated here."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Not used: ``PackedCache.update`` writes."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As for an empty cache."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """As for an empty cache; positions are passed explicitly."""
        return 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1


class PackedCache(Cache):
    """Writes the packed rows of many sequences into their extents; see ``packing``.

    ``attention`` is the attention function to register: it reads what was last updated.
    """

    def __init__(self, storage: Storage, index: Mapping[int, int], layers: int) -> None:
        """``index``: the model's layer index -> the storage's; ``layers``: of the model."""
        super().__init__(layers=[Blind() for _ in range(layers)])
        self._storage = storage
        self._index = index
        self._layer: int | None = None
        self.spans: Sequence[PackedSpan] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes rows ``[1, kv_heads, rows, dim]``; returns them as they came."""
        layer = self._layer = self._index[layer_idx]
        pool = self._storage.pool_of[layer]
        keys, values = key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)
        for packed in self.spans:
            rows = slice(packed.begin, packed.end)
            self._storage.write(layer, packed.writes[pool], keys[rows], values[rows])
        return key_states, value_states

    def attention(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """``query`` [1, heads, rows, dim] -> [1, rows, heads, value_dim]."""
        layer = self._layer
        self._layer = None
        if layer is None or query.shape[0] != 1:
            raise ConfigError("a layer attends to keys and values that it did not cache itself")
        if position_bias is not None:
            raise ConfigError("attention with a learned position bias can't be packed")
        storage = self._storage
        pool = storage.pool_of[layer]
        _, heads, rows, dim = query.shape
        out = query.new_empty(1, rows, heads, value.shape[-1])
        for packed in self.spans:
            mixed = attend(
                query[:, :, packed.begin : packed.end],
                storage.views(layer, packed.reads[pool]),
                packed.masks[pool],
                scale=dim**-0.5 if scaling is None else scaling,
                softcap=softcap,
                sinks=s_aux,
                causal=packed.causal,
            )
            out[:, packed.begin : packed.end] = mixed.transpose(1, 2)
        return out, None


_numbers = itertools.count()


def register(owner: object, attention: Callable[..., Any]) -> str:
    """Puts an attention function into transformers' registry; returns its unique name.

    It is taken out when ``owner`` is collected.
    """
    name = f"outrider_arena_{next(_numbers)}"
    ALL_ATTENTION_FUNCTIONS[name] = attention
    weakref.finalize(owner, ALL_ATTENTION_FUNCTIONS.pop, name, None)
    return name
