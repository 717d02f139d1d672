"""What is tried: a pair of models, how they are served, and requests, all drawn from one number."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from outrider.shared.core.rules import COUPLED, GREEDY, REJECTION, Rule
from outrider.shared.core.types import Decoding
from outrider_testing.architectures import ARCHITECTURES, LENGTHS
from outrider_testing.tokenizer_families import FAMILIES

POSITIONS = 128
"""Longest sequence of every model here."""
LINKS = ("grpc", "shm")
DRAFTS = ("near", "other seed", "llama", "wider", "narrower", "none")
KS = (0, 1, 2, 3, 5, 7, 16, None)


@dataclass(frozen=True)
class Case:
    """One pair and how it is served."""

    number: int
    architecture: str
    family: str
    """Of the tokenizer."""
    draft: str
    link: str
    padding: int
    """Rows of the base's vocabulary without a token."""
    eos: tuple[int, ...]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of each part's configuration."""


@dataclass(frozen=True)
class Asked:
    """One request, in plain values."""

    prompt: tuple[int, ...]
    count: int
    k: int | None
    rule: Rule
    sampling: dict[str, Any]
    logprobs: int | None = None
    samples: int = 1
    ignore_eos: bool = True
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    resume: tuple[int, ...] = ()
    echo: bool = False

    def decoding(self, seed: int, eos: Sequence[int]) -> Decoding:
        """What its tokens are chosen by."""
        values = dict(self.sampling)
        ending = () if self.ignore_eos else tuple(eos)
        return Decoding(
            **{
                "logit_bias": tuple(values.pop("logit_bias", {}).items()),
                "bad_words": tuple(values.pop("bad_words", ())),
                **values,
                "seed": seed,
                "rule": self.rule,
                "prompt_len": len(self.prompt),
                "eos_token_ids": (*ending, *self.stop_ids),
            }
        )


def draw_case(number: int) -> Case:
    """The case of a number, the same every time."""
    rng = random.Random(number)
    chunk = rng.choice((1, 7, 16, 512))
    model = {"prefill_chunk": chunk, "runner": rng.choice(("auto", "auto", "generic"))}
    return Case(
        number=number,
        architecture=rng.choice(list(ARCHITECTURES | LENGTHS)),
        family=rng.choice(list(FAMILIES)),
        draft=rng.choice(DRAFTS),
        link=rng.choice(LINKS),
        padding=rng.choice((0, 0, 3, 64)),
        eos=tuple(rng.sample(range(40), rng.choice((0, 1, 2)))),
        settings={
            "base": model,
            "draft": {"prefill_chunk": rng.choice((chunk, 512))},
            "coordinator": {
                "prefill_chunk": chunk,
                "grant_rounds": rng.choice((0, 1, 64, 64)),
                "max_running": rng.choice((2, 64)),
            },
        },
    )


def draw_requests(case: Case, tokens: int, vocab_size: int, texts: list[list[int]]) -> list[Asked]:
    """First requests of a case.

    ``tokens``: of the tokenizer; ``texts``: ids of sensible texts to begin with.
    """
    rng = random.Random(f"requests {case.number}")
    return [_request(rng, tokens, vocab_size, texts) for _ in range(rng.randint(4, 9))]


def follow_up(rng: random.Random, asked: Asked, ids: Sequence[int], text: str) -> Asked | None:
    """A request whose right answer ends, or begins, within that of ``asked``; None if none is."""
    plain = {"samples": 1, "resume": (), "stop": (), "stop_ids": ()}
    values = {name: getattr(asked, name) for name in asked.__dataclass_fields__} | plain
    values["k"] = rng.choice(KS)
    kind = rng.choice(("stop", "stop", "stop id", "resume"))
    if kind == "stop" and text:
        start = rng.randrange(len(text))
        piece = text[start : start + rng.randint(1, 4)]
        if "\N{REPLACEMENT CHARACTER}" not in piece:
            return Asked(**values | {"stop": (piece, "never to be seen")})
    # A stop id is forbidden before min_new_tokens, which changes the text.
    if kind == "stop id" and ids and not asked.sampling.get("min_new_tokens"):
        return Asked(**values | {"stop_ids": (rng.choice(list(ids)),)})
    # Under rejection, what follows depends on where the proposals began.
    if kind == "resume" and len(ids) > 1 and asked.rule is not REJECTION:
        return Asked(**values | {"resume": tuple(ids[: rng.randrange(1, len(ids))])})
    return None


def _request(rng: random.Random, tokens: int, vocab_size: int, texts: list[list[int]]) -> Asked:
    length = rng.choice((1, 2, rng.randint(3, 12), rng.randint(12, 60)))
    prompt = [rng.randrange(tokens) for _ in range(length)]
    if rng.random() < 0.4:
        prompt = rng.choice(texts)[:length]
    count = rng.choice((1, 2, rng.randint(3, 40)))
    sampling: dict[str, Any] = {}
    rule = GREEDY
    if rng.random() < 0.6:
        sampling["temperature"] = rng.choice((1e-6, 0.005, 0.3, 0.8, 1.0, 1.5, 50.0, 1e6))
        sampling["seed"] = rng.randrange(1 << 64)
        rule = rng.choice((COUPLED, COUPLED, REJECTION))
        for name, values in _CUTS.items():
            if rng.random() < 0.3:
                sampling[name] = rng.choice(values)
    for name, values in _PENALTIES.items():
        if rng.random() < 0.15:
            sampling[name] = rng.choice(values)
    some = [rng.randrange(vocab_size) for _ in range(6)]
    if rng.random() < 0.2:
        sampling["logit_bias"] = {some[0]: 4.0, some[1]: -100.0, some[2]: 0.5}
    if rng.random() < 0.2:
        sampling["bad_words"] = ((some[3],), (some[4], some[5]))
    if rng.random() < 0.2:
        sampling["min_new_tokens"] = rng.randint(1, count)
    return Asked(
        prompt=tuple(prompt),
        count=count,
        k=rng.choice(KS),
        rule=rule,
        sampling=sampling,
        logprobs=rng.choice((None, None, 0, 3)),
        samples=rng.choice((1, 1, 1, 3)),
        ignore_eos=rng.random() < 0.7,
        echo=rng.random() < 0.2,
    )


_CUTS: dict[str, tuple[float, ...]] = {
    "top_k": (1, 2, 5, 40, 1000),
    "top_p": (0.05, 0.5, 0.9, 0.99),
    "min_p": (0.01, 0.2, 0.9),
}
_PENALTIES: dict[str, tuple[float, ...]] = {
    "repetition_penalty": (0.7, 1.2, 3.0),
    "presence_penalty": (-1.0, 0.5, 2.0),
    "frequency_penalty": (-0.5, 0.3, 2.0),
}
