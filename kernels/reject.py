"""Verdicts by rejection sampling: integers, where the logits stay on the device.

The rule ``rejection`` (Leviathan, Kalman and Matias 2023; Chen et al. 2023) for rows whose
decoding is a temperature alone: same law, streams of noise and formulas as
``verify_service/rules/rejection.py``, hence the same verdicts but for ties in floating point.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from outrider.kernels.choose import gumbel, uniforms
from outrider.kernels.operation import (
    Arguments,
    Call,
    Implementation,
    Operation,
    Tools,
    always,
    no_cuda_source,
)

ENTRIES = 64
"""Entries of the draft's distribution at one row, at most."""
MAX_COUNT = 256
"""Rows of a launch at most, hence one more than the tokens of a proposal at most."""
THREADS = 256
MAX_BLOCKS = 32
SHARED = 16 * THREADS // 32 + 4 * ENTRIES + 16 + 4096
# Streams of the noise, see shared/sampling/noise.py, which this package can't import.
CHOICE, ACCEPT, RESIDUAL = 0, 2, 3


def reference(
    *,
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    tokens: Tensor,
    counts: Tensor,
    ids: Tensor,
    offered: Tensor,
    pending: Tensor,
    proposed: Tensor,
    verdicts: Tensor,
    count: int,
    overlap: bool = False,
) -> None:
    """verdicts[s] = (accepted, next token) of the sequences s with proposed[s] >= 0; the others'
    verdicts are left as they are. The next token is -1 where its row's largest logit is not
    finite (a NaN anywhere counts).

    Rows, of which the first ``count`` are looked at: ``logits`` float32 [.., vocabulary];
    ``temperatures`` float32, > 0 at rows that are judged; ``seeds`` int64 (the bits of the
    unsigned seed); ``positions`` int32, of the token that a row's logits choose; ``tokens``
    int32 [at least count], the rows' own; ``counts`` int32: entries of the distribution q from
    which the token of the next row was drawn, 0 at a row after which nothing is proposed, -1 at
    a row that nobody asks about; ``ids`` int32, distinct, and ``offered`` float32, both
    [.., ENTRIES]: those entries and their probabilities, which need not sum to 1. Sequences:
    ``pending`` int32, row of the pending token; ``proposed`` int32, K, or -1; ``verdicts`` int32
    [sequences, 2].
    """
    stands, chosen, _ = judged(
        logits, temperatures, seeds, positions, tokens, counts, ids, offered, count
    )
    steps = torch.arange(min(count, MAX_COUNT), device=logits.device)
    at = (pending[:, None].long() + steps).clamp_(max=count - 1)
    accepted = (stands[at] & (steps < proposed[:, None])).int().cumprod(-1).sum(-1)
    following = chosen[(pending.long() + accepted).clamp_(max=count - 1)]
    found = torch.stack((accepted, following), 1).int()
    verdicts.copy_(torch.where(proposed[:, None] >= 0, found, verdicts))


def judged(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    tokens: Tensor,
    counts: Tensor,
    ids: Tensor,
    offered: Tensor,
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row by itself: whether the next row's token stands, bool [count]; the token that
    takes its place, int64 [count]; how clear both are, float32 [count]: the smaller of the
    best score's lead over the second and the test's distance from its bound, relative to it.
    """
    counts, seeds, where = counts[:count], seeds[:count], positions[:count].long()
    heat = torch.where(counts >= 0, temperatures[:count], torch.ones_like(temperatures[:count]))
    scaled = logits[:count] / heat[:, None]
    p = scaled.log_softmax(-1).exp()
    present = torch.arange(ids.shape[1], device=ids.device) < counts[:, None]
    q = torch.where(present, offered[:count], torch.zeros_like(offered[:count]))
    q = q / q.sum(-1, keepdim=True).clamp_(min=1e-30)
    places = torch.where(present, ids[:count], torch.zeros_like(ids[:count])).long()
    dense = torch.zeros_like(p).scatter_add_(1, places, q)

    after = torch.arange(1, count + 1, device=logits.device).clamp_(max=tokens.shape[0] - 1)
    proposal = tokens[after].long()[:, None]
    p_at, q_at = p.gather(1, proposal)[:, 0], dense.gather(1, proposal)[:, 0]
    stream = torch.full_like(where, ACCEPT)
    tested = uniforms(seeds, where, 1, stream)[:, 0] * q_at

    offers = counts > 0
    weights = torch.where(offers[:, None], residual(p, dense), p)
    stream = torch.full_like(where, CHOICE).masked_fill_(offers, RESIDUAL)
    scores = weights.log() + gumbel(uniforms(seeds, where, logits.shape[1], stream))
    best = scores.topk(2).values
    clear = best[:, 0] - best[:, 1]
    clear = torch.where(offers, torch.minimum(clear, (tested / p_at - 1).abs()), clear)
    finite = scaled.amax(-1).isfinite()
    return finite & offers & (tested < p_at), torch.where(finite, scores.argmax(-1), -1), clear


def residual(p: Tensor, q: Tensor) -> Tensor:
    """The positive part of ``p - q`` [rows, vocabulary]; ``p`` where that is empty, since the two
    are equal there but for rounding."""
    weights = (p - q).clamp_(min=0)
    return torch.where(weights.amax(-1, keepdim=True) > 0, weights, p)


def _cuda(tools: Tools) -> Call:
    work: list[Tensor] = []

    def run(
        *,
        logits: Tensor,
        temperatures: Tensor,
        seeds: Tensor,
        positions: Tensor,
        tokens: Tensor,
        counts: Tensor,
        ids: Tensor,
        offered: Tensor,
        pending: Tensor,
        proposed: Tensor,
        verdicts: Tensor,
        count: int,
        overlap: bool = False,
    ) -> None:
        if not work:
            sizes = (MAX_COUNT * MAX_BLOCKS * 4, 1 + MAX_COUNT, 2 * MAX_COUNT)
            work.extend(
                torch.zeros(size, dtype=torch.int32, device=logits.device) for size in sizes
            )
        vocabulary = logits.shape[1]
        kernel = tools.compiler.kernel(
            "reject", "reject", {"BF16": 0}, threads=THREADS, shared=SHARED
        )
        # By the vocabulary alone, see reject.cu.
        blocks = max(1, min(MAX_BLOCKS, vocabulary // 2048))
        rows = (logits, temperatures, seeds, positions, tokens, counts, ids, offered)
        sequences = (pending, proposed, *work, verdicts, vocabulary, verdicts.shape[0])
        kernel.launch((blocks, count), (*rows, *sequences), overlap=overlap)

    return run


def _cases(device: torch.device, dtype: torch.dtype) -> Iterator[Arguments]:
    ragged, many = (3, -1, 0, 5, 1), (1, 2, 0, 3, 1, 2, 1, 0, -1, 2)
    for proposed, vocabulary in (
        ((4,), 1000), (ragged, 2051), ((2, 6), 5120), (many, 64), (many, 700), (many, 4098),
    ):  # fmt: skip
        # Two implementations may differ where a choice or a test is a tie in floating point:
        # drawn again until none is near one.
        clear = False
        while not clear:
            case = _case(device, proposed, vocabulary)
            names = "logits temperatures seeds positions tokens counts ids offered count"
            _, _, margins = judged(**{name: case[name] for name in names.split()})
            clear = bool((margins[case["counts"] >= 0] > 1e-2).all())
        if vocabulary == 2051:
            # Not finite: the first sequence's first row, the only one of the third, and the one
            # that the last sequence may end in.
            first, _, only, _, last = case["pending"].tolist()
            case["logits"][first, 2050] = math.nan
            case["logits"][only, 0], case["logits"][last + 1] = math.inf, -math.inf
        if vocabulary == 5120:
            # p is 1 at one token, q too but for what it gives to the proposed one: rejected,
            # and nothing is left of p - q.
            row = int(case["pending"][0])
            case["logits"][row], case["logits"][row, 7] = -math.inf, 3.0
            case["ids"][row, :2] = torch.tensor([7, 9])
            case["offered"][row, :2] = torch.tensor([1.0, 1e-30])
            case["counts"][row], case["tokens"][row + 1] = 2, 9
        yield case


def _case(device: torch.device, proposed: Sequence[int], vocabulary: int) -> Arguments:
    """Two rows before each pending one, and one after all; -1 is a sequence of another rule."""
    widths = [2 + 1 + max(k, 1) for k in proposed]
    pending = [sum(widths[:s]) + 2 for s in range(len(widths))]
    rows = sum(widths) + 1
    logits = 3 * torch.randn(rows, vocabulary, device=device)
    temperatures = 0.5 + torch.rand(rows, device=device)
    counts = torch.full((rows,), -1, dtype=torch.int32, device=device)
    for first, k in zip(pending, proposed, strict=True):
        counts[first : first + max(k, 0)] = torch.randint(1, ENTRIES + 1, (max(k, 0),)).to(counts)
        if k >= 0:
            counts[first + k] = 0
    temperatures = torch.where(counts < 0, 0.0, temperatures)
    draft = (logits + 0.5 * torch.randn_like(logits)) / 0.8
    best = draft.topk(ENTRIES)
    q = best.values.softmax(-1)
    beyond = torch.arange(ENTRIES, device=device) >= counts.clamp(min=1)[:, None]
    drawn = q.masked_fill(beyond, 0.0).multinomial(1)
    tokens = torch.randint(0, vocabulary, (rows,), device=device)
    tokens[1:] = best.indices.gather(1, drawn)[:-1, 0]
    return {
        "logits": logits,
        "temperatures": temperatures,
        "seeds": torch.randint(-(1 << 62), 1 << 62, (rows,), device=device),
        "positions": torch.randint(0, 100_000, (rows,), device=device).int(),
        "tokens": tokens.int(),
        "counts": counts,
        # What stands beyond a row's count is nobody's; what stands before it sums to less than 1.
        "ids": best.indices.masked_fill(beyond, -5).int(),
        "offered": (q / 2).masked_fill(beyond, math.nan),
        "pending": torch.tensor(pending, device=device, dtype=torch.int32),
        "proposed": torch.tensor(proposed, device=device, dtype=torch.int32),
        "verdicts": torch.full((len(proposed), 2), 77, device=device, dtype=torch.int32),
        "count": rows,
    }


OPERATION = Operation(
    "reject",
    "acceptance by rejection",
    reference,
    ("verdicts",),
    _cases,
    {},
    (
        Implementation("cuda", no_cuda_source, _cuda),
        Implementation("torch", always, lambda tools: reference, "0.1 ms a row of 128k tokens"),
    ),
)
