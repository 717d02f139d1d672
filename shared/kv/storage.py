"""The KV tensors: allocated once, written in place, read through views.

Layers of equal kind (window, KV heads, head sizes) form a *group*; a group has one tensor
``[layers, 2, tokens, kv_heads, head_dim]`` and is one pool of the arena. Keys and values of
different head sizes get one tensor each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.shared.core.errors import ConfigError
from outrider.shared.kv.arena import Arena, Copy, Extent, PoolPlan, Segment


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What one layer caches. ``window``: positions a row reads, itself included; None: all."""

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None

    @property
    def elements(self) -> int:
        """Elements of one token's keys and values in one layer."""
        return self.kv_heads * (self.key_dim + self.value_dim)


class Storage:
    """All KV memory of one process, with the arena that says who owns which slots."""

    def __init__(
        self,
        layers: Sequence[LayerKind],
        pools: Mapping[LayerKind, PoolPlan],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """``layers``: one kind per cached layer, in order. ``pools``: the slots of each kind,
        from ``shared_pools``."""
        self.layers = tuple(layers)
        self.dtype, self.device = dtype, device
        self.arena = Arena(list(pools.values()))
        self.kinds = tuple(pools)
        # Zeroed, because what was never written must not be NaN where a kernel reads a whole
        # block and multiplies what is masked by zero.
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.tensors: list[Tensor] = []
        # Per pool the whole tensor, where keys and values share one.
        self.tensors_of: list[Tensor] = []
        pool_of, place_of = [0] * len(layers), [0] * len(layers)
        for number, (kind, pool) in enumerate(pools.items()):
            own = [i for i, layer in enumerate(layers) if layer == kind]
            keys, values = self._allocate(kind, len(own), pool.tokens)
            self.keys.append(keys)
            self.values.append(values)
            for place, layer in enumerate(own):
                pool_of[layer], place_of[layer] = number, place
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors)
        self.pool_of, self.place_of = tuple(pool_of), tuple(place_of)
        # One view per layer, made once: [tokens, kv_heads, dim].
        self.layer_keys = [self.keys[p][i] for p, i in zip(pool_of, place_of, strict=True)]
        self.layer_values = [self.values[p][i] for p, i in zip(pool_of, place_of, strict=True)]

    def _allocate(self, kind: LayerKind, layers: int, tokens: int) -> tuple[Tensor, Tensor]:
        def zeros(*shape: int) -> Tensor:
            tensor = torch.zeros(shape, dtype=self.dtype, device=self.device)
            self.tensors.append(tensor)
            return tensor

        if kind.key_dim == kind.value_dim:
            both = zeros(layers, 2, tokens, kind.kv_heads, kind.key_dim)
            self.tensors_of.append(both)
            return both[:, 0], both[:, 1]
        self.tensors_of.append(torch.empty(0))
        return (
            zeros(layers, tokens, kind.kv_heads, kind.key_dim),
            zeros(layers, tokens, kind.kv_heads, kind.value_dim),
        )

    def write(self, layer: int, segments: Sequence[Segment], keys: Tensor, values: Tensor) -> None:
        """Copies rows ``[rows, kv_heads, dim]`` to ``segments``, in order."""
        own_keys, own_values = self.layer_keys[layer], self.layer_values[layer]
        row = 0
        for part in segments:
            own_keys[part.slot : part.slot + part.count].copy_(keys[row : row + part.count])
            own_values[part.slot : part.slot + part.count].copy_(values[row : row + part.count])
            row += part.count

    @torch.inference_mode()
    def copy(self, source: Extent, target: Extent, length: int) -> bool:
        """Copies the KV of the first ``length`` positions of ``source`` to ``target``, which is
        empty; they are valid there then. False, and nothing done, where ``Arena.copies`` has
        none."""
        copies = self.arena.copies(source, target, length)
        if copies is None:
            return False
        for one in copies:
            whole, layers = self.tensors_of[one.pool], (self.keys[one.pool], self.values[one.pool])
            if whole.numel():
                _move(whole.movedim(2, 0), one)
            else:
                for tensor in layers:
                    _move(tensor.movedim(1, 0), one)
        self.arena.copied(source, target, length)
        return True

    def views(self, layer: int, segments: Sequence[Segment]) -> list[tuple[Tensor, Tensor]]:
        """Zero-copy (keys, values) of ``segments``, each ``[1, kv_heads, count, dim]``."""
        keys, values = self.layer_keys[layer], self.layer_values[layer]
        return [
            (
                keys[s.slot : s.slot + s.count].transpose(0, 1).unsqueeze(0),
                values[s.slot : s.slot + s.count].transpose(0, 1).unsqueeze(0),
            )
            for s in segments
        ]

    def all_targets(self, pool: int, segments: Sequence[Segment]) -> list[list[Tensor]]:
        """For every layer of a pool, where rows go: ``[2, count, kv_heads, dim]`` per segment."""
        whole = self.tensors_of[pool]
        per_segment = [whole[:, :, s.slot : s.slot + s.count].unbind(0) for s in segments]
        return [list(layer) for layer in zip(*per_segment, strict=True)]

    def all_views(
        self, pool: int, segments: Sequence[Segment]
    ) -> list[list[tuple[Tensor, Tensor]]]:
        """``views`` of every layer of a pool, in a few calls for all of them."""
        whole = self.tensors_of[pool].flatten(0, 1)
        per_segment = []
        for s in segments:
            both = whole[:, s.slot : s.slot + s.count].transpose(1, 2).unsqueeze(1).unbind(0)
            per_segment.append(list(zip(both[0::2], both[1::2], strict=True)))
        return [list(layer) for layer in zip(*per_segment, strict=True)]


def _move(slots: Tensor, one: Copy) -> None:
    """Copies some of ``slots`` (the first dimension) to others."""
    slots[one.to : one.to + one.count].copy_(slots[one.start : one.start + one.count])


def shared_pools(
    layers: Sequence[LayerKind],
    *,
    budget: int,
    itemsize: int,
    max_sequences: int,
    slack: int,
    max_positions: int,
) -> dict[LayerKind, PoolPlan]:
    """Spends ``budget`` bytes on pools for the kinds in ``layers``, full attention first.

    ``itemsize``: bytes of one element. ``slack``: ring slots beyond a window, the most rows of
    one sequence in a forward. No pool is larger than ``max_sequences`` sequences of
    ``max_positions`` tokens could need; where there are rings as well as full attention, rings
    take half of the budget at most, unless one sequence needs more. Raises ``ConfigError`` where
    not even one short sequence fits.
    """
    kinds = _kinds(layers)
    token_bytes = {k: k.elements * itemsize * sum(one == k for one in layers) for k in kinds}
    rings = {k: min(k.window + slack, max_positions) for k in kinds if k.window is not None}
    ring_bytes = sum(token_bytes[k] * size for k, size in rings.items())
    full_bytes = sum(token_bytes[k] for k in kinds if k not in rings)
    sequences = max_sequences
    if ring_bytes:
        for_rings = budget // 2 if full_bytes else budget
        sequences = max(1, min(max_sequences, for_rings // ring_bytes))
    rest = budget - sequences * ring_bytes
    least = min(16, max_positions)
    tokens = min(rest // full_bytes, max_sequences * max_positions) if full_bytes else least
    if rest < 0 or tokens < least:
        raise ConfigError(
            f"arena_bytes: {budget} bytes do not hold one sequence of {least} tokens; "
            f"at least {least * full_bytes + ring_bytes} are needed"
        )
    return {
        k: PoolPlan(sequences * rings[k], k.window, slack) if k in rings else PoolPlan(tokens)
        for k in kinds
    }


def _kinds(layers: Sequence[LayerKind]) -> list[LayerKind]:
    """The kinds that occur: full attention first, larger windows first, else as they come."""
    distinct = list(dict.fromkeys(layers))
    return sorted(distinct, key=lambda k: (k.window is not None, -(k.window or 0)))
