"""A client's request, checked field by field and with every default resolved.

What passes here can be run: nothing later in the coordinator looks at a raw message again.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, replace

from outrider.coordinator.requests.sampling_fields import decoding_of
from outrider.coordinator.requests.text.tokenizer import Tokenizer
from outrider.protos import generation_pb2 as pb
from outrider.shared.core.errors import CapacityError, InvalidRequest
from outrider.shared.core.types import Decoding

MAX_SAMPLES = 16
MAX_STOP_STRINGS = 64
MAX_STOP_CHARACTERS = 1024
MAX_SALT_CHARACTERS = 256


@dataclass(frozen=True, slots=True)
class Limits:
    """What the models and the configuration allow."""

    vocab_size: int
    max_positions: int
    max_k: int
    slack: int
    """Tokens to reserve beyond prompt and new tokens: the largest proposal and one."""
    arena_longest: int
    """Slots that the longest sequence may have."""
    eos_token_ids: tuple[int, ...]
    default_k: int | None
    default_max_new_tokens: int
    max_new_tokens: int
    max_logprobs: int
    draft_top: int = 64
    """Entries kept of the draft's distribution under `rejection`."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One valid request."""

    request_id: str
    prompt_ids: tuple[int, ...]
    prompt_text: str
    """For echo."""
    resume_ids: tuple[int, ...]
    decoding: Decoding
    max_new_tokens: int
    """Resumed tokens included."""
    stop_strings: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    eos_token_ids: tuple[int, ...]
    """Empty when end-of-sequence is ignored."""
    k: int | None
    """None: the server chooses each round."""
    logprobs: int | None
    echo: bool
    num_samples: int
    capacity: int
    """Token slots that each sample reserves on each service."""
    cache_salt: str = ""
    """Requests take over KV only from those with the same salt."""
    traceparent: str = ""

    def sample_decoding(self, index: int) -> Decoding:
        """The decoding of one sample: the first has the request's seed, the others derive one."""
        if index == 0:
            return self.decoding
        return replace(self.decoding, seed=derived_seed(self.decoding.seed, index))


def derived_seed(seed: int, index: int) -> int:
    """The seed of sample ``index``: one step of SplitMix64 (Steele et al. 2014), 64 bits."""
    mask = (1 << 64) - 1
    z = (seed + index * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def validate(
    message: pb.GenerateRequest,
    limits: Limits,
    tokenizer: Tokenizer | None,
    *,
    traceparent: str = "",
) -> GenerationRequest:
    """``message`` with every field checked and every default resolved.

    Raises ``InvalidRequest`` with the field's path, and ``CapacityError`` (permanent) for a
    sequence that no arena of this server can ever hold.
    """
    prompt_ids, prompt_text = _prompt(message, limits, tokenizer)
    resume_ids = _ids("resume_token_ids.ids", message.resume_token_ids.ids, limits.vocab_size)
    max_new_tokens = _max_new_tokens(message.stopping, limits, len(prompt_ids))
    if len(resume_ids) > max_new_tokens:
        raise InvalidRequest(
            "resume_token_ids.ids",
            f"{len(resume_ids)} tokens",
            f"at most max_new_tokens = {max_new_tokens} tokens",
        )
    stop_strings = _stop_strings(message.stopping.stop, tokenizer)
    stop_ids = _ids("stopping.stop_token_ids", message.stopping.stop_token_ids, limits.vocab_size)
    eos = () if message.stopping.ignore_eos else limits.eos_token_ids
    samples = _ranged("output.num_samples", message.output, "num_samples", 1, 1, MAX_SAMPLES)
    if samples > 1 and resume_ids:
        raise InvalidRequest("output.num_samples", samples, "1 where resume_token_ids is set")
    if len(message.cache_salt) > MAX_SALT_CHARACTERS:
        raise InvalidRequest(
            "cache_salt",
            f"{len(message.cache_salt)} characters",
            f"at most {MAX_SALT_CHARACTERS} characters",
        )
    logprobs = None
    if message.output.HasField("logprobs"):
        logprobs = _ranged("output.logprobs", message.output, "logprobs", 0, 0, limits.max_logprobs)
    k = limits.default_k
    if message.speculation.HasField("k"):
        k = _ranged("speculation.k", message.speculation, "k", 0, 0, limits.max_k)
    decoding = decoding_of(
        message.sampling,
        message.speculation.rule,
        vocab_size=limits.vocab_size,
        max_new_tokens=max_new_tokens,
        ending_ids=tuple(dict.fromkeys((*eos, *stop_ids))),
        prompt_len=len(prompt_ids),
        logprobs=logprobs,
        # Seeds stay below 2**63 so that any client language can send one back.
        fresh_seed=lambda: secrets.randbits(63),
        draft_top=limits.draft_top,
    )
    capacity = len(prompt_ids) + max_new_tokens + limits.slack
    if capacity > limits.arena_longest:
        raise CapacityError(
            f"the sequence needs {capacity} token slots (prompt {len(prompt_ids)} + "
            f"max_new_tokens {max_new_tokens} + {limits.slack} for proposals); the KV arena of "
            f"this server has {limits.arena_longest}",
            permanent=True,
        )
    return GenerationRequest(
        request_id=uuid.uuid4().hex,
        prompt_ids=prompt_ids,
        prompt_text=prompt_text,
        resume_ids=resume_ids,
        decoding=decoding,
        max_new_tokens=max_new_tokens,
        stop_strings=stop_strings,
        stop_token_ids=stop_ids,
        eos_token_ids=eos,
        k=k,
        logprobs=logprobs,
        echo=message.output.echo and not resume_ids,
        num_samples=samples,
        capacity=capacity,
        cache_salt=message.cache_salt,
        traceparent=traceparent,
    )


def _prompt(
    message: pb.GenerateRequest, limits: Limits, tokenizer: Tokenizer | None
) -> tuple[tuple[int, ...], str]:
    """Ids and text of the prompt."""
    kind = message.WhichOneof("input")
    if kind is None:
        raise InvalidRequest("input", None, "one of prompt, prompt_token_ids and conversation")
    if kind == "prompt_token_ids":
        field = "prompt_token_ids.ids"
        ids = _ids(field, message.prompt_token_ids.ids, limits.vocab_size)
        text = tokenizer.decode(ids) if tokenizer and message.output.echo else ""
    else:
        if tokenizer is None:
            raise InvalidRequest(kind, "text", "prompt_token_ids: this server has no tokenizer")
        field = kind
        if kind == "prompt":
            text = message.prompt
            if not text:
                raise InvalidRequest("prompt", text, "at least one character")
        else:
            text = _rendered(message.conversation, tokenizer)
        # A template writes its special tokens itself.
        ids = tuple(tokenizer.encode(text, special=kind == "prompt"))
        if ids and max(ids) >= limits.vocab_size:
            raise InvalidRequest(
                field, f"token {max(ids)}", f"text of the model's {limits.vocab_size} tokens"
            )
    if not ids:
        raise InvalidRequest(field, list(ids), "at least one token")
    if len(ids) >= limits.max_positions:
        raise InvalidRequest(
            field,
            f"{len(ids)} tokens",
            f"at most {limits.max_positions - 1} tokens: the model's context is "
            f"{limits.max_positions}, one of them new",
        )
    return ids, text


def _rendered(conversation: pb.Conversation, tokenizer: Tokenizer) -> str:
    if not conversation.messages:
        raise InvalidRequest("conversation.messages", [], "at least one message")
    for index, one in enumerate(conversation.messages):
        if not one.role:
            raise InvalidRequest(f"conversation.messages[{index}].role", "", "not empty")
    return tokenizer.chat.render(
        [{"role": one.role, "content": one.content} for one in conversation.messages]
    )


def _ids(field: str, ids: Iterable[int], vocab_size: int) -> tuple[int, ...]:
    made = tuple(ids)
    if made and max(made) >= vocab_size:
        index = next(i for i, token in enumerate(made) if token >= vocab_size)
        raise InvalidRequest(f"{field}[{index}]", made[index], f"in [0, {vocab_size})")
    return made


def _ranged(
    field: str,
    message: pb.OutputOptions | pb.SpeculationParameters,
    name: str,
    default: int,
    low: int,
    high: int,
) -> int:
    if not message.HasField(name):
        return default
    value: int = getattr(message, name)
    if not low <= value <= high:
        raise InvalidRequest(field, value, f"in [{low}, {high}]")
    return value


def _max_new_tokens(stopping: pb.StopConditions, limits: Limits, prompt_len: int) -> int:
    room = limits.max_positions - prompt_len
    most = min(limits.max_new_tokens, room)
    if not stopping.HasField("max_new_tokens"):
        # The default adapts to what fits, the client asked for no number.
        spare = limits.arena_longest - prompt_len - limits.slack
        return max(1, min(limits.default_max_new_tokens, most, spare))
    value = stopping.max_new_tokens
    if not 1 <= value <= most:
        why = ""
        if value > room:
            why = f": the model's context is {limits.max_positions}, the prompt has {prompt_len}"
        raise InvalidRequest("stopping.max_new_tokens", value, f"in [1, {most}]{why}")
    return value


def _stop_strings(stops: Iterable[str], tokenizer: Tokenizer | None) -> tuple[str, ...]:
    made = tuple(dict.fromkeys(stops))
    if made and tokenizer is None:
        raise InvalidRequest("stopping.stop", made[0], "unset: this server has no tokenizer")
    if len(made) > MAX_STOP_STRINGS:
        raise InvalidRequest(
            "stopping.stop", f"{len(made)} strings", f"at most {MAX_STOP_STRINGS} strings"
        )
    for index, stop in enumerate(made):
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            raise InvalidRequest(
                f"stopping.stop[{index}]", stop, f"1 to {MAX_STOP_CHARACTERS} characters"
            )
    return made
