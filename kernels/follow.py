"""The draft's first rows of a turn, from the verifier's slots.

See ``take`` for how turns are taken.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from outrider.kernels.operation import (
    Arguments,
    Call,
    Implementation,
    Operation,
    Tools,
    always,
    no_cuda_source,
)
from outrider.kernels.take import ENDED, MAX_SEQUENCES


def reference(
    *,
    bell: Tensor,
    slots: Tensor,
    chosen: Tensor,
    pending: Tensor,
    ks: Tensor,
    limits: Tensor,
    tokens: Tensor,
    positions: Tensor,
    noise_positions: Tensor,
    row_counts: Tensor,
    active: Tensor,
    seen: Tensor,
    count: int,
    overlap: bool = False,
) -> None:
    """Two rows for each of ``count`` sequences: the last two tokens of its log. The draft may have
    the KV of neither: not that of the last token it proposed, and none of the base's own.

    int32, contiguous, but for ``bell``, int64 [1], the verifier's. Read: ``slots`` [sequences, 4]:
    (accepted, next token, the log's length n, whether the sequence goes on), see ``settle``;
    ``chosen`` [steps, at least count]: the draft's tokens of its last turn; per sequence ``ks``:
    the most tokens to propose; ``limits``: the log's length at which the sequence ends. Read and
    written, per sequence: ``pending``: the log's last token. Written: ``tokens`` [at least
    2 * count]: the rows; per sequence ``positions``: n - 2, that of the first row;
    ``noise_positions``: n, that of the first proposed token; ``row_counts``: 2; ``active`` [steps,
    at least count]: 1 for the steps that propose a token; ``seen`` [sequences, 4]: the slots, none
    of which goes on where the bell says that the grant is over. Zero, and ``pending`` as it was,
    where a sequence does not go on, or has a limit of 0.
    """
    accepted, token, n, flag = slots[:count].unbind(1)
    ended = (bell & ENDED) == ENDED
    goes_on = (flag != 0) & ~ended & (limits[:count] > 0)
    steps = active.shape[0]
    last = (accepted.clamp(1, steps) - 1).long()[None]
    before = torch.where(accepted > 0, chosen[:, :count].gather(0, last)[0], pending[:count])
    k = torch.where(goes_on, torch.minimum(ks[:count], limits[:count] - n - 1), 0)
    rows = torch.stack((before.clamp(min=0), token), 1)
    seen[:count] = slots[:count]
    seen[:count, 3] = torch.where(ended, 0, flag)
    tokens[: 2 * count] = torch.where(goes_on[:, None], rows, 0).flatten()
    positions[:count] = torch.where(goes_on, n - 2, 0)
    noise_positions[:count] = torch.where(goes_on, n, 0)
    row_counts[:count] = torch.where(goes_on, 2, 0)
    active[:, :count] = torch.arange(steps, device=k.device)[:, None] < k
    pending[:count] = torch.where(goes_on, token, pending[:count])


def _cuda(tools: Tools) -> Call:
    def run(
        *,
        bell: Tensor,
        slots: Tensor,
        chosen: Tensor,
        pending: Tensor,
        ks: Tensor,
        limits: Tensor,
        tokens: Tensor,
        positions: Tensor,
        noise_positions: Tensor,
        row_counts: Tensor,
        active: Tensor,
        seen: Tensor,
        count: int,
        overlap: bool = False,
    ) -> None:
        kernel = tools.compiler.kernel("follow", "follow", {"BF16": 0}, threads=64, shared=0)
        read = (bell, slots, chosen, pending, ks, limits)
        written = (tokens, positions, noise_positions, row_counts, active, seen)
        sizes = (active.shape[0], chosen.shape[1], active.shape[1], count)
        kernel.launch((1,), (*read, *written, *sizes), overlap=overlap)

    return run


def _cases(device: torch.device, dtype: torch.dtype) -> Iterator[Arguments]:
    def ints(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, device=device, dtype=torch.int32)

    for count, steps in ((1, 1), (1, 4), (5, 4), (MAX_SEQUENCES, 5)):
        for first, turns in ((0, 7), (1, 7), (4, 7), (13, 7), (1, ENDED)):
            # Every length of the accepted prefix at every distance of the limit, 0 as well, where
            # a sequence ends; one in eleven has a next token that is not one.
            each = torch.arange(count, device=device, dtype=torch.int32) + first
            room, n = each // (steps + 1) % 7, ints(2, 1000, count)
            broken = each % 11 == 10
            token = torch.where(broken, -1, ints(0, 9, count))
            goes_on = (room > 0) & ~broken
            slots = ints(0, 9, MAX_SEQUENCES, 4)
            slots[:count] = torch.stack((each % (steps + 1), token, n, goes_on.int()), 1)
            yield {
                "bell": torch.tensor([3 << 32 | turns], device=device),
                "slots": slots,
                "chosen": ints(-1, 9, steps, MAX_SEQUENCES),
                "pending": ints(0, 9, count),
                "ks": ints(0, steps + 2, count),
                "limits": n + room,
                "tokens": ints(0, 9, 2 * count + 3),
                "positions": ints(0, 9, MAX_SEQUENCES),
                "noise_positions": ints(0, 9, MAX_SEQUENCES),
                "row_counts": ints(0, 9, MAX_SEQUENCES),
                "active": ints(0, 9, steps, MAX_SEQUENCES),
                "seen": ints(0, 9, MAX_SEQUENCES, 4),
                "count": count,
            }


OPERATION = Operation(
    "follow",
    "the draft's first rows of a turn",
    reference,
    ("pending", "tokens", "positions", "noise_positions", "row_counts", "active", "seen"),
    _cases,
    {},
    (
        Implementation("cuda", no_cuda_source, _cuda),
        Implementation("torch", always, lambda tools: reference, "forty launches instead of one"),
    ),
)
