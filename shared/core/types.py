"""The values that travel between Outrider's parts. Plain Python: no torch, no gRPC.

``n`` is ``committed_len`` throughout: the number of tokens of a sequence that are
final. The pending token is ``log[n-1]``; its KV is not written yet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from outrider.shared.core.parameters import (
    UINT64,
    Number,
    TokenBiases,
    TokenLists,
    Whole,
    declared,
    parameter,
)
from outrider.shared.core.rules import GREEDY, Rule

_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 1e-6, 1e30
"""Beyond these, scaled logits leave the range of float32; 0 is the way to say greedy."""
_MOST_PENALTY, _MOST_BIAS = 1e6, 1e20
"""Together with the least temperature they leave every logit a finite float32."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How the tokens of one sequence are chosen, every default resolved.

    Meanings are those of Hugging Face transformers' logits processors and warpers.
    ``temperature`` 0 is argmax: nothing is sampled then, and every rule is ``greedy``. Noise is
    a pure function of (``seed``, position, token id), where position is the index of the chosen
    token in the sequence, prompt included.
    """

    temperature: float = parameter(
        0.0,
        Number(0, _MOST_TEMPERATURE, least=_LEAST_TEMPERATURE),
        help="0 takes the likeliest token",
    )
    top_k: int = parameter(0, Whole(), help="keep the k likeliest; 0 keeps all")
    top_p: float = parameter(
        1.0, Number(0, 1, low_open=True), help="keep the fewest that reach this probability"
    )
    min_p: float = parameter(
        0.0, Number(0, 1, high_open=True), help="drop what is below this share of the likeliest one"
    )
    repetition_penalty: float = parameter(
        1.0,
        Number(1 / _MOST_PENALTY, _MOST_PENALTY),
        help="for tokens of prompt and output; 1 is none",
    )
    presence_penalty: float = parameter(
        0.0, Number(-2, 2), help="subtracted once from tokens of the output"
    )
    frequency_penalty: float = parameter(
        0.0, Number(-2, 2), help="subtracted per occurrence in the output"
    )
    logit_bias: tuple[tuple[int, float], ...] = parameter(
        (), TokenBiases(_MOST_BIAS), help="added to its logit; may be repeated"
    )
    bad_words: tuple[tuple[int, ...], ...] = parameter(
        (), TokenLists(), help="never these in a row; may be repeated"
    )
    eos_token_ids: tuple[int, ...] = ()
    min_new_tokens: int = parameter(0, Whole(), help="tokens before the text may end")
    prompt_len: int = 0
    seed: int = parameter(0, Whole(high=UINT64), help="of the noise; drawn and reported if unset")
    rule: Rule = GREEDY
    logprobs: int | None = None
    draft_top: int = 64
    vocab_size: int = 0
    """Ids from here on are never chosen: the base, whose text it is, has none. 0 where the
    model's own vocabulary is no larger."""

    def __post_init__(self) -> None:
        # Nobody who looks at the rule needs to look at the temperature, too.
        if not self.temperature > 0:
            object.__setattr__(self, "rule", GREEDY)


PARAMETERS = declared(Decoding)
"""What a client may ask for, by name."""


@dataclass(frozen=True, slots=True)
class SparseRow:
    """A truncated distribution over the vocabulary: entries not listed are zero."""

    ids: tuple[int, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class OpenSequence:
    """Admission of one sequence: ``capacity`` token slots are reserved or it is refused.

    With ``parent_id``, its first ``prefix_len`` tokens are those of that sequence, and so is
    their KV where the service can share it; else nothing is held and the first item that relies
    on it is refused as ``KV_MISSING``. With ``copy`` the sequence gets a copy of it, as far as it
    is held, and the parent may be a cached sequence.
    """

    sequence_id: int
    epoch: int
    capacity: int
    decoding: Decoding
    parent_id: int | None = None
    prefix_len: int = 0
    copy: bool = False


@dataclass(frozen=True, slots=True)
class ProposeItem:
    """Ask the draft for ``k`` tokens after ``log[:base_len] + append``.

    ``base_len``: tokens whose KV the draft may keep (it rolls back to this);
    ``append`` = ``log[base_len:]``, ending in the pending token.
    ``k`` = 0 takes in all of ``append`` and proposes nothing (a prefill chunk).
    """

    sequence_id: int
    epoch: int
    base_len: int
    append: tuple[int, ...]
    k: int


@dataclass(frozen=True, slots=True)
class Proposal:
    """What the draft offers at positions ``committed_len``, ``committed_len + 1``, …"""

    sequence_id: int
    epoch: int
    committed_len: int
    tokens: tuple[int, ...]
    rows: tuple[SparseRow, ...] = ()


@dataclass(frozen=True, slots=True)
class VerifyItem:
    """Ask the verifier to judge ``proposal`` after ``log[:base_len] + append``.

    ``extend_only`` takes in all of ``append`` and chooses no token (a prefill chunk).
    """

    sequence_id: int
    epoch: int
    base_len: int
    append: tuple[int, ...]
    proposal: tuple[int, ...] = ()
    rows: tuple[SparseRow, ...] = ()
    extend_only: bool = False


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """Natural log-probabilities at one position, from the base's processed distribution."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the verifier answers: ``num_accepted`` proposed tokens stand, then ``next_token``.

    ``committed_len`` is the log's new length; ``next_token`` is None for ``extend_only``.
    ``logprobs`` has one entry for each emitted token, when asked for.
    """

    sequence_id: int
    epoch: int
    num_accepted: int
    next_token: int | None
    committed_len: int
    logprobs: tuple[PositionLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    """One sequence of a round was refused (``code`` is an ``errors.RefusalCode``)."""

    sequence_id: int
    epoch: int
    code: int
    message: str
    held_len: int = 0


@dataclass(frozen=True, slots=True)
class CostPoint:
    """What a round of one size takes an engine: model and host, until the answer is known.

    ``amount``, of each sequence: rows for the verifier (1 + K), tokens proposed for the draft (K).
    """

    sequences: int
    amount: int
    seconds: float


T = TypeVar("T")


@dataclass(slots=True)
class RoundResult(Generic[T]):
    """A service's answer to one round: ``answers`` in item order, refused ones left out."""

    answers: list[T] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    model_seconds: float = 0.0
    rows: int = 0
    cut: int = 0
    """Proposed tokens that were left out, since they can't be judged."""
    evicted: list[int] = field(default_factory=list)
    """Cached sequences that are gone since the last answer."""
