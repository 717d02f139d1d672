"""The sampling fields of a request, checked and resolved into a ``Decoding``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from outrider.protos import generation_pb2 as pb
from outrider.shared.core import rules
from outrider.shared.core.errors import InvalidRequest
from outrider.shared.core.types import PARAMETERS, Decoding


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
    sent = {field.name: value for field, value in sampling.ListFields()}
    chosen = {
        name: one.kind.checked(f"sampling.{name}", sent[name], vocab_size)
        for name, one in PARAMETERS.items()
        if name in sent
    }
    if "seed" not in chosen:
        chosen["seed"] = fresh_seed()
    made = Decoding(
        **chosen,
        eos_token_ids=ending_ids,
        prompt_len=prompt_len,
        logprobs=logprobs,
        draft_top=draft_top,
        vocab_size=vocab_size,
    )
    if made.min_new_tokens > max_new_tokens:
        raise InvalidRequest(
            "sampling.min_new_tokens",
            made.min_new_tokens,
            f"at most max_new_tokens = {max_new_tokens}",
        )
    return replace(made, rule=_rule(rule, made.temperature))


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
