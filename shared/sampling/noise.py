"""Counter-based noise: a pure function of (seed, position, token id, stream).

No state, no generator objects: whoever knows the four numbers gets the same noise,
on any device, in any batch, in any order. That is what makes a run replayable and
lets the draft and the verifier share their noise without a word on the wire.

The generator is Philox-4x32-10 (``philox.py``). One call turns a 128-bit counter and a
64-bit key into four 32-bit words::

    key     = (seed low 32 bits, seed high 32 bits)
    counter = (token id >> 2, position, 0, stream)
    word    = output[token id & 3]

so four adjacent token ids share one call. From a word ``w`` the noise is::

    u = min(float32(w) * 2^-32 + 2^-33, 1 - 2^-24)      uniform, in [2^-33, 1 - 2^-24]
    g = -log(-log1p(-u))                                standard Gumbel

``float32(w)`` rounds to nearest even and both constants are powers of two, so ``u`` is
the same bit for bit everywhere, with or without fused multiply-add. Small ``u`` gives
large ``g``: float32 is finest near zero, so the tail that decides about unlikely tokens
is resolved to 2^-33. ``g`` lies in [-2.82, 22.88] and may differ between devices in the
last bits of the two logarithms, never more.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from outrider.shared.sampling.philox import Words, philox_numpy, philox_torch

_MASK = 0xFFFFFFFF
_LARGEST_UNIFORM = 1.0 - 2.0**-24


class Stream(IntEnum):
    """What a piece of noise is for. Two uses at one position never share a stream."""

    CHOICE = 0
    """The base's own choice, and the draft's under ``coupled``: shared on purpose."""
    DRAFT = 1
    """The draft's sampling under ``rejection``."""
    ACCEPT = 2
    """The accept tests of ``rejection``."""
    RESIDUAL = 3
    """The token that replaces a rejected one under ``rejection``."""


def seed_tensor(seeds: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Unsigned 64-bit seeds as the int64 tensor [rows] of the same bits."""
    signed = [s - (1 << 64) if s >= 1 << 63 else s for s in seeds]
    return torch.tensor(signed, dtype=torch.int64, device=device)


def gumbel(
    seeds: Tensor, positions: Tensor, vocab_size: int, *, stream: int | Tensor = Stream.CHOICE
) -> Tensor:
    """Gumbel noise for whole rows: float32 [rows, vocab_size].

    ``seeds``, ``positions``: int64 [rows]. ``stream``: one for all, or int64 [rows].
    """
    quads = (vocab_size + 3) // 4
    blocks = torch.arange(quads, device=seeds.device)[None, :]
    stream = stream[:, None] if isinstance(stream, Tensor) else stream
    words = _words(blocks, positions[:, None], stream, seeds[:, None])
    out = torch.empty((seeds.shape[0], quads, 4), dtype=torch.float32, device=seeds.device)
    for i, word in enumerate(words):
        out[..., i].copy_(word)
    return _to_gumbel(out.view(-1, quads * 4))[:, :vocab_size]


def gumbel_at(
    seeds: Tensor, positions: Tensor, ids: Tensor, *, stream: int | Tensor = Stream.CHOICE
) -> Tensor:
    """Gumbel noise of chosen token ids only: float32, the shape of ``ids``.

    ``ids``: int64; ``seeds``, ``positions`` (and ``stream``) broadcast against it, so
    for ids [rows, m] give seeds [rows, 1]. Equals ``gumbel`` at those ids.
    """
    words = torch.stack(_words(ids >> 2, positions, stream, seeds))
    chosen = words.gather(0, (ids & 3).expand(words.shape[1:])[None])[0]
    return _to_gumbel(chosen.to(torch.float32))


def uniform(seeds: Tensor, positions: Tensor, *, stream: int | Tensor) -> Tensor:
    """One uniform number in the open interval (0, 1) each: float32.

    ``seeds``, ``positions``: int64, broadcast against each other. It is the word of token
    id 0 of that stream.
    """
    block = torch.zeros((), dtype=torch.int64, device=seeds.device)
    return _to_uniform(_words(block, positions, stream, seeds)[0].to(torch.float32))


def _words(blocks: Tensor, positions: Tensor, stream: int | Tensor, seeds: Tensor) -> list[Tensor]:
    """The four words, int64, of the counters of these blocks of four token ids."""
    if seeds.device.type != "cpu":
        halves = (seeds & _MASK, (seeds >> 32) & _MASK)
        return philox_torch((blocks, positions, 0, stream), halves)
    bits = _unsigned(seeds)
    key = (bits & np.uint64(_MASK), bits >> np.uint64(32))
    label = _unsigned(stream) if isinstance(stream, Tensor) else int(stream)
    counter = (_unsigned(blocks), _unsigned(positions), 0, label)
    return [torch.from_numpy(w.view(np.int64)) for w in philox_numpy(counter, key)]


def _unsigned(values: Tensor) -> Words:
    """The same bits as a NumPy array; no copy."""
    return values.numpy().view(np.uint64)


def _to_uniform(words: Tensor) -> Tensor:
    """In place: float32 words to u."""
    return words.mul_(2.0**-32).add_(2.0**-33).clamp_(max=_LARGEST_UNIFORM)


def _to_gumbel(words: Tensor) -> Tensor:
    """In place: float32 words to g; the sign of u is folded into the constants."""
    minus_u = words.mul_(-(2.0**-32)).sub_(2.0**-33).clamp_(min=-_LARGEST_UNIFORM)
    return minus_u.log1p_().neg_().log_().neg_()
