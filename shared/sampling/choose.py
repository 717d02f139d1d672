"""Logits to tokens, the same for the base and the draft.

``process`` turns raw logits into the processed logits whose softmax is *the* distribution
of a position; ``choose`` takes the token. At temperature 0 that is the argmax, lowest id
on ties; above it is the argmax of processed logits plus Gumbel noise, which is an exact
sample of the softmax (the Gumbel-max trick; Maddison, Tarlow and Minka 2014). The noise is
a function of (seed, position, token id), so the choice depends on nothing but the logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from outrider.shared.core.types import Decoding, SparseRow
from outrider.shared.sampling.noise import Stream, gumbel, gumbel_at, seed_tensor
from outrider.shared.sampling.penalties import (
    RowContext,
    apply_penalties,
    is_penalised,
    may_forbid_all,
)
from outrider.shared.sampling.warpers import truncates, warp

__all__ = [
    "RowContext",
    "choice_noise",
    "choose",
    "dead_rows",
    "penalise",
    "process",
    "propose",
    "reshapes",
    "sample",
]


def process(logits: Tensor, rows: Sequence[RowContext]) -> Tensor:
    """Raw logits [rows, vocab], any float type, to processed logits, float32.

    Order: logit bias, repetition, presence and frequency penalties, bad words, minimum new
    tokens; then, at temperature > 0, temperature, top-k, top-p, min-p. Dropped tokens are
    -inf. ``logits`` is never written to, and comes back itself if it is float32 and
    nothing applies.
    """
    return warp(penalise(logits, rows), [row.decoding for row in rows])


def penalise(logits: Tensor, rows: Sequence[RowContext]) -> Tensor:
    """The first half of ``process``: what does not depend on the temperature."""
    scores = logits.to(torch.float32)
    if any(is_penalised(row.decoding) for row in rows):
        scores = apply_penalties(scores, rows)
    return scores


def reshapes(d: Decoding) -> bool:
    """Whether ``process`` does more for ``d`` than divide by the temperature."""
    return is_penalised(d) or truncates(d)


def takes_likeliest(d: Decoding) -> bool:
    """Whether the token of a row is the largest of its logits as they are, and that is all."""
    return d.temperature == 0 and d.logprobs is None and not reshapes(d)


def choose(processed: Tensor, rows: Sequence[RowContext], noise: Tensor | None = None) -> list[int]:
    """The token of each row; one transfer from the device.

    ``noise``: the rows of ``choice_noise`` if the caller computed it ahead; only rows at
    temperature > 0 look at it.
    """
    sampled = [i for i, row in enumerate(rows) if row.decoding.temperature > 0]
    if sampled:
        processed = _perturb(processed, rows, sampled, noise)
    return processed.argmax(-1).tolist()


def sample(
    processed: Tensor, seeds: Tensor, positions: Tensor, *, stream: int | Tensor = Stream.CHOICE
) -> Tensor:
    """One token a row from softmax(processed), int64 [rows]: the argmax with noise added.

    ``processed``: [rows, vocab], not necessarily normalised; ``seeds``, ``positions``:
    int64 [rows].
    """
    noise = gumbel(seeds, positions, processed.shape[-1], stream=stream)
    return noise.add_(processed).argmax(-1)


def choice_noise(
    decodings: Sequence[Decoding],
    positions: Sequence[int],
    vocab_size: int,
    device: torch.device | str,
) -> Tensor | None:
    """The noise ``choose`` will want at these positions, float32 [rows, vocab]; None if none.

    Noise does not depend on tokens, so a draft can have that of its K positions in one
    call (for K = 4, half the cost of four), and a verifier can have it while it waits.
    """
    # A row that keeps few tokens is cheaper without, on the CPU.
    on_cpu = torch.device(device).type == "cpu"
    if all(d.temperature == 0 or (on_cpu and truncates(d)) for d in decodings):
        return None
    seeds = seed_tensor([d.seed for d in decodings], device)
    return gumbel(seeds, torch.tensor(list(positions), device=device), vocab_size)


def _perturb(
    processed: Tensor, rows: Sequence[RowContext], sampled: list[int], noise: Tensor | None
) -> Tensor:
    """``processed`` plus noise in the sampled rows; a new tensor."""
    part = processed if len(sampled) == len(rows) else processed[sampled]
    if noise is not None:
        perturbed = part + (noise if len(sampled) == len(rows) else noise[sampled])
    else:
        contexts = [rows[i] for i in sampled]
        seeds = seed_tensor([row.decoding.seed for row in contexts], processed.device)
        positions = torch.tensor([row.position for row in contexts], device=processed.device)
        if processed.device.type == "cpu" and all(truncates(row.decoding) for row in contexts):
            perturbed = _perturb_support(part, seeds, positions)
        else:
            perturbed = gumbel(seeds, positions, part.shape[-1]).add_(part)
    if len(sampled) == len(rows):
        return perturbed
    whole = processed.clone()
    whole[sampled] = perturbed
    return whole


def _perturb_support(part: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Noise for the tokens that were not dropped only. On a GPU counting them would make
    the host wait, so this is for the CPU."""
    perturbed = torch.full_like(part, -math.inf)
    row, token = (part > -math.inf).nonzero(as_tuple=True)
    noise = gumbel_at(seeds[row], positions[row], token)
    perturbed[row, token] = part[row, token] + noise
    return perturbed


def dead_rows(processed: Tensor, rows: Sequence[RowContext]) -> list[int]:
    """The rows of ``processed`` [rows, vocab] in which no token may be chosen, ascending.

    Only those are looked at whose decoding can forbid everything; one transfer if there are any.
    """
    asked = [i for i, row in enumerate(rows) if may_forbid_all(row.decoding)]
    if not asked:
        return []
    best = processed[asked].amax(-1).tolist()
    return [i for i, value in zip(asked, best, strict=True) if value == -math.inf]


def propose(
    logits: Tensor, rows: Sequence[RowContext], noise: Tensor | None = None
) -> tuple[list[int], list[SparseRow | None]]:
    """The draft's choice for each row of logits [rows, vocab].

    It is ``choose``, and the row is None, unless the rule needs rows. Then the token is
    drawn, with noise of its own, from the draft's distribution cut to its ``draft_top``
    likeliest tokens; that distribution comes with it, likeliest first, as the very float32
    numbers that were drawn from. The token is -1 where nothing is allowed.
    """
    processed = process(logits, rows)
    drawn = [i for i, row in enumerate(rows) if row.decoding.rule.needs_rows]
    tokens = choose(processed, rows, noise) if len(drawn) < len(rows) else [0] * len(rows)
    sparse: list[SparseRow | None] = [None] * len(rows)
    if drawn:
        part = processed if len(drawn) == len(rows) else processed[drawn]
        for i, token, row in zip(drawn, *_draw(part, [rows[i] for i in drawn]), strict=True):
            tokens[i], sparse[i] = token, row
    for i in dead_rows(processed, rows):
        tokens[i], sparse[i] = -1, None
    return tokens, sparse


def _draw(processed: Tensor, rows: Sequence[RowContext]) -> tuple[list[int], list[SparseRow]]:
    device, vocab_size = processed.device, processed.shape[-1]
    sizes = [min(max(row.decoding.draft_top, 1), vocab_size) for row in rows]
    seeds = seed_tensor([row.decoding.seed for row in rows], device)
    positions = torch.tensor([row.position for row in rows], device=device)
    limits = torch.tensor(sizes, device=device)
    tokens, ids, q = draw_truncated(processed, seeds, positions, limits, max(sizes))
    # Through NumPy: a tensor's tolist() takes 1 us an entry.
    host_tokens, host_ids, host_q = (t.cpu().numpy().tolist() for t in (tokens, ids, q))
    sparse = []
    for row_ids, row_q in zip(host_ids, host_q, strict=True):
        kept = [(token, p) for token, p in zip(row_ids, row_q, strict=True) if p > 0]
        sparse.append(SparseRow(tuple(t for t, _ in kept), tuple(p for _, p in kept)))
    return host_tokens, sparse


def draw_truncated(
    processed: Tensor, seeds: Tensor, positions: Tensor, sizes: Tensor, largest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws from softmax(processed) cut to its likeliest ``sizes`` tokens, with stream DRAFT.

    ``processed``: [rows, vocab]; the others int64 [rows], with ``largest`` the largest of
    ``sizes``, given so that nobody waits for the device. Returns the tokens int64 [rows],
    and the distribution they were drawn from: ids int64 and probabilities float32, both
    [rows, largest], likeliest first, probability 0 beyond a row's size.
    """
    best, ids = processed.topk(largest)
    beyond = torch.arange(best.shape[-1], device=best.device)[None, :] >= sizes[:, None]
    q = best.masked_fill(beyond, -math.inf).softmax(-1)
    noise = gumbel_at(seeds[:, None], positions[:, None], ids, stream=Stream.DRAFT)
    at = (q.log() + noise).argmax(-1, keepdim=True)
    return ids.gather(1, at).squeeze(1), ids, q
