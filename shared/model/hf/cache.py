"""The arena as a transformers cache: what the rows of one forward, or a whole ``generate``, need.

This file, ``packed_cache`` and ``layer_kinds`` are the only ones that know that interface. An
``ArenaCache`` serves one sequence, or a batch of equal lengths, with whatever attention the model
has: ``update`` returns views of the valid prefix. It is also what Hugging Face's own
``generate(past_key_values=...)`` takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from outrider.shared.kv.arena import Extent, Segment
from outrider.shared.kv.storage import Storage
from outrider.shared.model.hf.packed_cache import Blind


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
        index: Mapping[int, int],
        seen: int = 0,
    ) -> None:
        """``extents``: one per sequence of the batch. ``index``: the model's layer index -> the
        storage's; layers that are not in it have no cache of their own."""
        super().__init__(
            layers=[
                ArenaLayer(storage, index[i], extents, seen) if i in index else Blind()
                for i in range(max(index) + 1)
            ]
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See ``ArenaLayer.update``."""
        layer: Any = self.layers[layer_idx]  # an `ArenaLayer` or `Blind`
        written: tuple[Tensor, Tensor] = layer.update(key_states, value_states)
        return written
