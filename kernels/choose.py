"""One token a row: the argmax of the logits, at a temperature with noise added.

The noise is that of ``shared/sampling/noise.py``: counter-based Philox, a pure function of (seed,
position, token id). Rows whose choice needs more than a temperature (penalties, top-k, top-p)
are processed before, in PyTorch.
"""

from __future__ import annotations

import math
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
    no_triton,
)

MAX_BLOCKS = 64
THREADS = 256
MAX_COUNT = 256


def reference(
    *,
    logits: Tensor,
    rows: Tensor | None,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    offset: int,
    tokens: Tensor,
    count: int,
    overlap: bool = False,
) -> None:
    """tokens[i] = argmax of logits[rows[i]] / temperatures[i] + gumbel(seeds[i], positions[i] +
    offset, ·) for i < count; temperature 0 is the plain argmax, lowest id on ties; -1 where a
    row's largest entry is not finite (a NaN anywhere counts).

    ``logits`` float32 [.., vocabulary]; ``rows`` int32 or None for 0, 1, …; ``temperatures``
    float32, ``seeds`` int64 (the bits of the unsigned seed), ``positions``, ``tokens`` int32.
    """
    picked = logits[:count] if rows is None else logits.index_select(0, rows[:count])
    hot = temperatures[:count, None] > 0
    heat = torch.where(hot, temperatures[:count, None], torch.ones_like(temperatures[:count, None]))
    noise = gumbel(uniforms(seeds[:count], positions[:count].long() + offset, logits.shape[1]))
    scores = torch.where(hot, picked / heat + noise, picked)
    tokens[:count] = torch.where(scores.amax(-1).isfinite(), scores.argmax(-1), -1)


def uniforms(
    seeds: Tensor, positions: Tensor, vocabulary: int, stream: Tensor | None = None
) -> Tensor:
    """The noise of token ids 0 … ``vocabulary`` - 1 as numbers in (0, 1), float32 [rows, ids].

    ``seeds``, ``positions``, and ``stream`` (None: 0), int64 [rows]. Written apart from
    ``shared/sampling/noise.py``, which this package can't import.
    """
    mask, ids = 0xFFFFFFFF, torch.arange((vocabulary + 3) // 4, device=seeds.device)
    zero = torch.zeros((seeds.shape[0], ids.shape[0]), dtype=torch.int64, device=seeds.device)
    label = zero if stream is None else zero + stream[:, None]
    c = [zero + ids, zero + positions[:, None], zero, label]
    k = [(seeds & mask)[:, None], (seeds >> 32 & mask)[:, None]]
    for _ in range(10):
        # Products of two 32-bit words wrap in int64; shift and mask still give both halves.
        p, q = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(q >> 32 & mask) ^ c[1] ^ k[0], q & mask, (p >> 32 & mask) ^ c[3] ^ k[1], p & mask]
        k = [k[0] + 0x9E3779B9 & mask, k[1] + 0xBB67AE85 & mask]
    words = torch.stack(c, -1).flatten(1)[:, :vocabulary].float()
    return (words * 2.0**-32 + 2.0**-33).clamp_(max=1 - 2.0**-24)


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise of ``uniforms``."""
    return -torch.log(-torch.log1p(-uniform))


def _cuda(tools: Tools) -> Call:
    work: list[Tensor] = []

    def run(
        *,
        logits: Tensor,
        rows: Tensor | None,
        temperatures: Tensor,
        seeds: Tensor,
        positions: Tensor,
        offset: int,
        tokens: Tensor,
        count: int,
        overlap: bool = False,
    ) -> None:
        if not work:
            whole = torch.zeros(MAX_COUNT * MAX_BLOCKS, device=logits.device)
            work.extend((whole, whole.int(), whole[:MAX_COUNT].int()))
        vocabulary = logits.shape[1]
        kernel = tools.compiler.kernel(
            "choose", "choose", {"BF16": 0}, threads=THREADS, shared=8 * THREADS // 32 + 16
        )
        blocks = max(1, min(MAX_BLOCKS, 2 * tools.processors // count, vocabulary // 1024))
        kernel.launch(
            (blocks, count),
            (logits, rows, temperatures, seeds, positions, offset, *work, tokens, vocabulary),
            overlap=overlap,
        )

    return run


def _triton(tools: Tools) -> Call:
    from outrider.kernels.choose_triton import launch_choose

    return launch_choose


def _cases(device: torch.device, dtype: torch.dtype) -> Iterator[Arguments]:
    for count, vocabulary in ((1, 1000), (5, 2051), (3, 4096)):
        logits = torch.randn(count + 2, vocabulary, device=device)
        logits[1, [7, 70]] = 9.0  # a tie: the lowest id
        if count == 5:
            logits[2, 2050], logits[3, 0], logits[4] = math.nan, math.inf, -math.inf
        yield {
            "logits": logits,
            "rows": torch.randperm(count + 2, device=device)[:count].int(),
            "temperatures": torch.tensor([0.0, 0.7, 1.3, 0.0, 1.0][:count], device=device),
            "seeds": torch.randint(-(1 << 62), 1 << 62, (count,), device=device),
            "positions": torch.randint(0, 100_000, (count,), device=device).int(),
            "offset": 3,
            "tokens": torch.empty(count, device=device, dtype=torch.int32),
            "count": count,
        }


OPERATION = Operation(
    "choose",
    "argmax with counter-based noise",
    reference,
    ("tokens",),
    _cases,
    {},
    (
        Implementation("cuda", no_cuda_source, _cuda),
        Implementation("triton", no_triton, _triton),
        Implementation("torch", always, lambda tools: reference, "0.1 ms a row of 128k tokens"),
    ),
)
