"""The arena as a transformers cache; the only file that knows that interface.

Two caches, for two ways to forward:

* ``PackedCache``: the rows of many sequences in one packed row dimension. ``update`` writes each
  sequence's rows to its extent, and an attention function of our own, put into transformers'
  attention registry, reads them from there. No mask is made: the registry knows no mask
  function for our name.
* ``ArenaCache``: the rows of one sequence, or of a batch of equal lengths, with whatever attention
  the model has. ``update`` returns views of the valid prefix. It is also what Hugging Face's own
  ``generate(past_key_values=...)`` takes.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from outrider.shared.arena import Extent, Segment
from outrider.shared.attention import attend
from outrider.shared.errors import ConfigError
from outrider.shared.packing import PackedSpan
from outrider.shared.storage import LayerKind, Storage, exact_pools


class _Blind(CacheLayerMixin):
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
        super().__init__(layers=[_Blind() for _ in range(layers)])
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


class ArenaLayer(CacheLayerMixin):
    """One layer of an ``ArenaCache``: positions ``0 … seen-1`` of every extent are cached."""

    is_croppable = True

    def __init__(
        self, storage: Storage, layer: int, extents: Sequence[Extent], seen: int = 0
    ) -> None:
        super().__init__()
        self._storage, self._layer, self._extents = storage, layer, tuple(extents)
        self.seen = seen
        self.window = storage.layers[layer].window
        self.is_sliding = self.window is not None
        self.is_initialized = True
        self.dtype, self.device = storage.dtype, storage.device

    @property
    def batch_size(self) -> int:
        """Sequences in the batch."""
        return len(self._extents)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is allocated here."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes rows ``[batch, kv_heads, rows, dim]``; returns all that they may read.

        Zero-copy, save where a ring has wrapped: what transformers' own attention takes is one
        tensor in the order of positions, so the pieces are joined.
        """
        storage, layer = self._storage, self._layer
        rows = key_states.shape[2]
        end = self.seen + rows
        first = self.seen - self.get_mask_sizes(rows)[0] + rows
        slack = storage.arena.pools[storage.pool_of[layer]].slack
        if self.window is None or rows <= slack or end <= self._ring():
            self._write(key_states, value_states, self.seen)
            self.seen = end
            return self._read(first, end)
        # More rows than the ring takes while the first of them still reads: read, then write.
        before = self._read(first, self.seen)
        keys = torch.cat([before[0], key_states], dim=2)
        values = torch.cat([before[1], value_states], dim=2)
        kept = min(rows, self._ring())
        self._write(key_states[:, :, -kept:], value_states[:, :, -kept:], end - kept)
        self.seen = end
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the keys that ``update`` returns for so many rows."""
        first = 0 if self.window is None else max(0, self.seen - self.window + 1)
        return self.seen + query_length - first, first

    def get_seq_length(self) -> int:
        """Positions cached so far."""
        return self.seen

    def get_max_length(self) -> int:
        """Capacity, or the window, in tokens."""
        return self._extents[0].capacity if self.window is None else self.window

    def reset(self) -> None:
        """Forgets everything; no memory is touched."""
        self.seen = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Negative: forgets so many tokens. Positive: forgets all but so many."""
        self.seen = (
            self.seen + tokens_to_remove
            if tokens_to_remove <= 0
            else min(self.seen, tokens_to_remove)
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Copies the KV of the chosen beams; the one operation that moves KV."""
        first = 0 if self.window is None else max(0, self.seen - self._ring())
        keys, values = (part.clone() for part in self._read(first, self.seen))
        self._write(keys[beam_idx], values[beam_idx], first)

    def _ring(self) -> int:
        return self._extents[0].places[self._storage.pool_of[self._layer]][1]

    def _segments(self, extent: Extent, first: int, end: int) -> list[Segment]:
        pool = self._storage.pool_of[self._layer]
        return self._storage.arena.segments(extent, pool, first, end)

    def _write(self, keys: Tensor, values: Tensor, start: int) -> None:
        end = start + keys.shape[2]
        for i, extent in enumerate(self._extents):
            self._storage.write(
                self._layer,
                self._segments(extent, start, end),
                keys[i].transpose(0, 1),
                values[i].transpose(0, 1),
            )

    def _read(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        segments = [self._segments(extent, first, end) for extent in self._extents]
        keys, values = self._storage.layer_keys, self._storage.layer_values
        return _gather(keys[self._layer], segments), _gather(values[self._layer], segments)


def _gather(layer: Tensor, segments: Sequence[Sequence[Segment]]) -> Tensor:
    """What the sequences of a batch read: ``[batch, kv_heads, keys, dim]``, a view if it can."""
    pieces = [
        _batched([layer[s.slot : s.slot + s.count] for s in parts])
        for parts in zip(*segments, strict=True)
    ] or [layer[:0].unsqueeze(0).expand(len(segments), -1, -1, -1)]
    joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
    return joined.transpose(1, 2)


def _batched(parts: Sequence[Tensor]) -> Tensor:
    """Views ``[count, heads, dim]`` as one ``[batch, count, heads, dim]``.

    Extents of one size that lie side by side are one strided view; others are stacked.
    """
    if len(parts) == 1:
        return parts[0].unsqueeze(0)
    step = parts[1].storage_offset() - parts[0].storage_offset()
    offsets = [parts[0].storage_offset() + i * step for i in range(len(parts))]
    if step > 0 and [part.storage_offset() for part in parts] == offsets:
        return parts[0].as_strided((len(parts), *parts[0].shape), (step, *parts[0].stride()))
    return torch.stack(list(parts))


class ArenaCache(Cache):
    """Extents of an arena as the cache of one forward, or of a whole ``generate``."""

    def __init__(
        self,
        storage: Storage,
        extents: Sequence[Extent],
        index: Mapping[int, int] | None = None,
        seen: int = 0,
    ) -> None:
        """``extents``: one per sequence of the batch. ``index``: the model's layer index -> the
        storage's; layers that are not in it have no cache of their own."""
        index = index if index is not None else {i: i for i in range(len(storage.layers))}
        self._extents = tuple(extents)
        super().__init__(
            layers=[
                ArenaLayer(storage, index[i], extents, seen) if i in index else _Blind()
                for i in range(max(index) + 1)
            ]
        )

    @classmethod
    def for_model(cls, model: Any, max_length: int, batch_size: int = 1) -> ArenaCache:
        """A cache of its own for ``model.generate(past_key_values=...)``.

        ``max_length``: prompt and new tokens, together. Raises ``ConfigError`` for models that
        the arena can't serve.
        """
        kinds, index = layer_kinds(model)
        slack = min(max_length, 64)
        storage = Storage(
            kinds,
            exact_pools(kinds, max_length, batch_size, slack),
            dtype=model.dtype,
            device=model.device,
        )
        extents = [storage.arena.admit(max_length) for _ in range(batch_size)]
        return cls(storage, extents, index)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See ``ArenaLayer.update``."""
        return self.layers[layer_idx].update(key_states, value_states)  # type: ignore[no-any-return]


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
    if name not in ("DynamicLayer", "DynamicSlidingWindowLayer"):
        raise ConfigError(
            f"a layer's state is a {name}, not keys and values of full or sliding-window attention"
        )
