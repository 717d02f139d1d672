"""What rounds that the host asks for and turns that the device takes have in common: the numbers
that a step needs, and the draft's chain of forwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from outrider.shared.kv.arena import Extent
from outrider.shared.model.cuda.forward import Batch, Forward
from outrider.shared.model.cuda.inputs import Field
from outrider.shared.model.cuda.passes import HEAD_ROWS, MAX_SEQUENCES


def numbers(pools: int, steps: int, rows: int = HEAD_ROWS) -> list[Field]:
    """The numbers of a step of at most ``rows`` rows, for at most ``steps`` proposed tokens over
    ``pools`` of the arena."""
    return [
        Field("seeds", (HEAD_ROWS,), "l"),
        Field("tokens", (rows,)),
        Field("starts", (pools, MAX_SEQUENCES)),
        Field("prefix_starts", (pools, MAX_SEQUENCES)),
        Field("prefix_lens", (MAX_SEQUENCES,)),
        Field("first_rows", (MAX_SEQUENCES,)),
        Field("row_counts", (MAX_SEQUENCES,)),
        Field("positions", (MAX_SEQUENCES,)),
        Field("picks", (HEAD_ROWS,)),
        Field("noise_positions", (HEAD_ROWS,)),
        Field("temperatures", (HEAD_ROWS,), "f"),
        Field("pending", (MAX_SEQUENCES,)),
        Field("proposed", (MAX_SEQUENCES,)),
        Field("active", (max(steps, 1), MAX_SEQUENCES)),
    ]


def places(host: dict[str, NDArray[np.generic]], extents: Sequence[Extent]) -> None:
    """Writes where the KV of the sequences lies to ``numbers`` on the host."""
    count = len(extents)
    host["prefix_lens"][:count] = [extent.prefix_len for extent in extents]
    for pool in range(host["starts"].shape[0]):
        host["starts"][pool, :count] = [extent.places[pool][0] for extent in extents]
        host["prefix_starts"][pool, :count] = [
            0 if extent.parent is None else extent.parent.places[pool][0] for extent in extents
        ]


def batch_of(own: dict[str, Tensor]) -> Batch:
    """Where the rows stand, by ``numbers`` on the device."""
    return Batch(
        own["tokens"],
        own["starts"],
        own["first_rows"],
        own["row_counts"],
        own["positions"],
        own["prefix_starts"],
        own["prefix_lens"],
    )


def draft_step(
    step: Forward,
    own: dict[str, Tensor],
    size: tuple[int, int, int],
    picks: Tensor | None,
    iota: Tensor,
    chosen: Tensor,
    j: int,
) -> None:
    """Proposes the j-th token (from 0) of each sequence, to ``chosen[j]``.

    ``own``: ``numbers`` on the device; ``size``: rows, sequences and most rows of one sequence
    of the first forward, whose row of sequence s is ``picks[s]`` (s where None); ``iota``: 0, 1, …
    """
    _, sequences, _ = size
    if j == 0:
        step.run(batch_of(own), *size, head=False)
        step.head(sequences, picks)
    else:
        # Its row stands j - 1 after the position that the first proposed token is for.
        batch = replace(
            batch_of(own),
            tokens=chosen[j - 1],
            first_rows=iota,
            row_counts=own["active"][j],
            positions=own["noise_positions"],
        )
        step.run(batch, sequences, sequences, 1, offset=j - 1)
    step.choose(
        sequences, None, own["temperatures"], own["seeds"], own["noise_positions"], chosen[j], j
    )


def signed(seed: int) -> int:
    """The int64 with the bits of an unsigned 64-bit seed."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
