"""The distribution a token comes from, by transformers' own processors and a full recompute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from outrider.shared.core.types import Decoding


def openai_penalties(decoding: Decoding) -> Callable[[Tensor, Tensor], Tensor]:
    """Presence and frequency, which transformers lacks, counted in plain Python."""

    def apply(input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        output = input_ids[0, decoding.prompt_len :].tolist()
        for token in set(output):
            scores[0, token] -= (
                output.count(token) * decoding.frequency_penalty + decoding.presence_penalty
            )
        return scores

    return apply


def processors_of(d: Decoding) -> Any:
    """transformers' processors for ``d``, in the order of its ``generate``."""
    chain: list[Any] = []
    if d.logit_bias:
        chain.append(hf.SequenceBiasLogitsProcessor([[[t], b] for t, b in d.logit_bias]))
    if d.repetition_penalty != 1.0:
        chain.append(hf.RepetitionPenaltyLogitsProcessor(d.repetition_penalty))
    chain.append(openai_penalties(d))
    if d.bad_words:
        chain.append(hf.NoBadWordsLogitsProcessor([list(w) for w in d.bad_words], None))
    if d.min_new_tokens:
        ending = list(d.eos_token_ids)
        chain.append(hf.MinNewTokensLengthLogitsProcessor(d.prompt_len, d.min_new_tokens, ending))
    if d.temperature > 0:
        chain.append(hf.TemperatureLogitsWarper(d.temperature))
        if d.top_k:
            chain.append(hf.TopKLogitsWarper(d.top_k))
        if d.top_p < 1:
            chain.append(hf.TopPLogitsWarper(d.top_p))
        if d.min_p:
            chain.append(hf.MinPLogitsWarper(d.min_p))
    return LogitsProcessorList(chain)


def logprobs(model: Any, log: Sequence[int], decoding: Decoding) -> Tensor:
    """``[written, vocab]``: what each token after the prompt was chosen from.

    One forward of ``model`` over the whole text, without a cache.
    """
    tokens = torch.tensor([list(log)])
    with torch.inference_mode():
        logits = model(tokens, use_cache=False).logits[0].float()
    apply = processors_of(decoding)
    rows = [
        apply(tokens[:, :at], logits[at - 1 : at])[0] for at in range(decoding.prompt_len, len(log))
    ]
    return torch.stack(rows).log_softmax(-1)
