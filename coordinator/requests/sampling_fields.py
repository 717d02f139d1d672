"""The sampling fields of a request, checked and resolved into a ``Decoding``."""

from __future__ import annotations

import math
from collections.abc import Callable

from outrider.protos import generation_pb2 as pb
from outrider.shared.core import rules
from outrider.shared.core.errors import InvalidRequest
from outrider.shared.core.types import Decoding

MIN_TEMPERATURE = 1e-6
"""Below this, scaled logits leave the range of float32; 0 is the way to say greedy."""
MAX_BAD_WORDS = 4096


def decoding_of(
    sampling: pb.SamplingParameters,
    rule: int,
    *,
    vocab_size: int,
    max_new_tokens: int,
    ending_ids: tuple[int, ...],
    prompt_len: int,
    logprobs: int | None,
    fresh_seed: Callable[[], int],
    draft_top: int = 64,
) -> Decoding:
    """The decoding that ``sampling`` and ``rule`` (``AcceptanceRule``) ask for.

    ``ending_ids`` are the tokens that ``min_new_tokens`` forbids. Raises ``InvalidRequest``.
    """
    temperature = _number(
        sampling,
        "temperature",
        0.0,
        lambda v: v == 0 or v >= MIN_TEMPERATURE,
        f"0 or a finite number >= {MIN_TEMPERATURE:g}",
    )
    min_new_tokens = _whole(sampling, "min_new_tokens")
    if min_new_tokens > max_new_tokens:
        raise InvalidRequest(
            "sampling.min_new_tokens", min_new_tokens, f"at most max_new_tokens = {max_new_tokens}"
        )
    return Decoding(
        temperature=temperature,
        top_k=_whole(sampling, "top_k"),
        top_p=_number(sampling, "top_p", 1.0, lambda v: 0 < v <= 1, "in (0, 1]"),
        min_p=_number(sampling, "min_p", 0.0, lambda v: 0 <= v < 1, "in [0, 1)"),
        repetition_penalty=_number(
            sampling, "repetition_penalty", 1.0, lambda v: v > 0, "a finite number > 0"
        ),
        presence_penalty=_number(
            sampling, "presence_penalty", 0.0, lambda v: -2 <= v <= 2, "in [-2, 2]"
        ),
        frequency_penalty=_number(
            sampling, "frequency_penalty", 0.0, lambda v: -2 <= v <= 2, "in [-2, 2]"
        ),
        logit_bias=_logit_bias(sampling, vocab_size),
        bad_words=_bad_words(sampling, vocab_size),
        eos_token_ids=ending_ids,
        min_new_tokens=min_new_tokens,
        prompt_len=prompt_len,
        seed=sampling.seed if sampling.HasField("seed") else fresh_seed(),
        rule=_rule(rule, temperature),
        logprobs=logprobs,
        draft_top=draft_top,
    )


def _number(
    sampling: pb.SamplingParameters,
    name: str,
    default: float,
    good: Callable[[float], bool],
    allowed: str,
) -> float:
    if not sampling.HasField(name):
        return default
    value = float(getattr(sampling, name))
    if not (math.isfinite(value) and good(value)):
        raise InvalidRequest(f"sampling.{name}", value, allowed)
    return value


def _whole(sampling: pb.SamplingParameters, name: str) -> int:
    value: int = getattr(sampling, name)
    if value < 0:
        raise InvalidRequest(f"sampling.{name}", value, "a whole number >= 0")
    return value


def _logit_bias(sampling: pb.SamplingParameters, vocab_size: int) -> tuple[tuple[int, float], ...]:
    for token, bias in sampling.logit_bias.items():
        field = f"sampling.logit_bias[{token}]"
        if token >= vocab_size:
            raise InvalidRequest(field, token, f"a token in [0, {vocab_size})")
        if not math.isfinite(bias):
            raise InvalidRequest(field, bias, "a finite number")
    return tuple(sorted(sampling.logit_bias.items()))


def _bad_words(sampling: pb.SamplingParameters, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    if len(sampling.bad_words) > MAX_BAD_WORDS:
        raise InvalidRequest(
            "sampling.bad_words",
            f"{len(sampling.bad_words)} sequences",
            f"at most {MAX_BAD_WORDS} sequences",
        )
    for index, word in enumerate(sampling.bad_words):
        field = f"sampling.bad_words[{index}].ids"
        if not word.ids:
            raise InvalidRequest(field, [], "at least one token")
        if max(word.ids) >= vocab_size:
            raise InvalidRequest(field, max(word.ids), f"tokens in [0, {vocab_size})")
    return tuple(dict.fromkeys(tuple(word.ids) for word in sampling.bad_words))


def _rule(number: int, temperature: float) -> rules.Rule:
    try:
        asked = rules.asked(number, temperature)
    except ValueError as error:
        raise InvalidRequest("speculation.rule", number, str(error)) from None
    if temperature > 0 and not asked.samples:
        others = " or ".join(one.name for one in rules.RULES.values() if one.samples)
        raise InvalidRequest(
            "speculation.rule", asked.name, f"{others} at temperature {temperature:g}"
        )
    return asked
