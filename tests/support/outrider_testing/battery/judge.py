"""What is right, by transformers' ``generate`` and the ``tokenizers`` library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from outrider.protos import generation_pb2 as pb
from outrider.shared.core.rules import REJECTION
from outrider.shared.core.types import Decoding
from outrider.shared.sampling.noise import gumbel, seed_tensor
from outrider_testing.battery.cases import Asked
from outrider_testing.processors import processors_of

CLOSE = 1e-5
"""Of the largest score: what float32 sums of another order may differ by, several times over."""


@dataclass(frozen=True)
class Verdict:
    """What was found wrong, or empty; ``tie``: a choice between equals, after which nothing is
    compared."""

    wrong: str = ""
    tie: bool = False


@dataclass
class Answer:
    """What one sample of a request gave."""

    ids: list[int]
    text: str
    logprobs: list[Any]
    finished: Any


class Judge:
    """Knows the base and its tokenizer by the libraries alone."""

    def __init__(self, model: Any, tokenizer: Tokenizer, eos: Sequence[int]) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.eos = tuple(eos)

    def judge(self, asked: Asked, answer: Answer) -> Verdict:
        """Tokens, log-probabilities, end and text of one sample."""
        if answer.finished is None:
            return Verdict("the stream has no end")
        made = [*asked.resume, *answer.ids]
        if len(made) > asked.count:
            return Verdict(f"{len(made)} tokens of at most {asked.count}")
        size = self.model.config.vocab_size
        if strange := [token for token in made if not 0 <= token < size]:
            return Verdict(f"token {strange[0]} is outside the vocabulary")
        decoding = asked.decoding(answer.finished.seed, self.eos)
        contexts = self._raw(asked, made)
        scores = [processors_of(decoding)(*context)[0] for context in contexts]
        for at in range(len(asked.resume), len(made)):
            found = self._token(scores[at], made[at], decoding, at)
            if found.wrong and self._at_a_cut(contexts[at], made[at], decoding, at):
                return Verdict(tie=True)
            if found.wrong or found.tie:
                return found
        wrong = self._logprobs(asked, answer, scores)
        for near in _near(decoding) if wrong else ():
            other = [processors_of(near)(*context)[0] for context in contexts]
            if not self._logprobs(asked, answer, other):
                return Verdict(tie=True)
        return Verdict(wrong or self._end(asked, answer, made) or self._text(asked, answer, made))

    def _raw(self, asked: Asked, made: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """The tokens before each of ``made``, ``[1, length]``, and the logits, ``[1, vocab]``.

        ``generate`` itself runs, cache and all, and is made to write these tokens.
        """
        if not made:
            return []
        seen: list[tuple[Tensor, Tensor]] = []

        def force(input_ids: Tensor, scores: Tensor) -> Tensor:
            seen.append((input_ids.clone(), scores.float().clone()))
            forced = torch.full_like(scores, -torch.inf)
            forced[0, made[len(seen) - 1]] = 0.0
            return forced

        prompt = torch.tensor([asked.prompt])
        with torch.inference_mode():
            self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=len(made),
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                logits_processor=[force],
            )
        return seen

    def _at_a_cut(
        self, context: tuple[Tensor, Tensor], token: int, decoding: Decoding, at: int
    ) -> bool:
        """Whether the token is right where a cut keeps a hair more, or less."""
        return any(
            not self._token(processors_of(near)(*context)[0], token, near, at).wrong
            for near in _near(decoding)
        )

    def _token(self, scores: Tensor, token: int, decoding: Decoding, at: int) -> Verdict:
        where = f"token {at}"
        if scores[token] == -torch.inf:
            return Verdict(f"{where} is {token}, which is forbidden")
        if decoding.rule is REJECTION:
            return Verdict()  # one of many; how often each is the matter of other tests
        # Rounding is that of the logits, which a small temperature enlarges.
        scale = _largest(scores)
        if decoding.temperature > 0:
            position = torch.tensor([decoding.prompt_len + at])
            scores = scores + gumbel(seed_tensor([decoding.seed]), position, scores.shape[-1])[0]
        best = int(scores.argmax())
        if token == best:
            return Verdict()
        gap = float(scores[best] - scores[token])
        if gap < CLOSE * scale:
            return Verdict(tie=True)
        return Verdict(f"{where} is {token}, must be {best}; its score is {gap:.3g} below")

    def _logprobs(self, asked: Asked, answer: Answer, scores: Sequence[Tensor]) -> str:
        if asked.logprobs is None:
            return "" if not answer.logprobs else "log-probabilities that nobody asked for"
        if len(answer.logprobs) != len(answer.ids):
            return f"{len(answer.logprobs)} log-probabilities of {len(answer.ids)} tokens"
        right = [row.double().log_softmax(-1) for row in scores[len(asked.resume) :]]
        for index, one in enumerate(answer.logprobs):
            row = right[index]
            allowed = CLOSE * _largest(scores[len(asked.resume) + index])
            told = [(answer.ids[index], one.logprob), *((t.token_id, t.logprob) for t in one.top)]
            for token, value in told:
                if not (abs(value - float(row[token])) <= allowed or value == float(row[token])):
                    return f"log-probability {index} of {token}: {value}, must be {row[token]:.6g}"
            best = sorted((float(v) for v in row.topk(len(one.top)).values), reverse=True)
            for t, value in zip(one.top, best, strict=True):
                if not (abs(t.logprob - value) <= allowed or t.logprob == value):
                    return f"log-probability {index}: {t.logprob} among the best, not {value:.6g}"
        return ""

    def _end(self, asked: Asked, answer: Answer, made: Sequence[int]) -> str:
        """The reason, and that nothing before it would have ended the text."""
        ending = set(asked.stop_ids) | (set() if asked.ignore_eos else set(self.eos))
        new = range(len(asked.resume), len(made))
        for at in new:
            stop = self._stopped(asked, made[: at + 1]) if made[at] not in ending else None
            if made[at] in ending:
                wanted = "STOP_TOKEN" if made[at] in asked.stop_ids else "END_OF_SEQUENCE"
            elif stop is not None:
                wanted = "STOP_STRING"
            elif at + 1 == asked.count:
                wanted = "MAX_TOKENS"
            else:
                continue
            if at + 1 < len(made):
                return f"goes on after token {at}, which ends it as {wanted}"
            told = str(pb.FinishReason.Name(answer.finished.reason)).removeprefix("FINISH_REASON_")
            if told != wanted:
                return f"ended as {told}, must be {wanted}"
            return ""
        return "" if not new else f"ended after {len(made)} tokens without a reason"

    def _stopped(self, asked: Asked, made: Sequence[int]) -> int | None:
        """Where in the text after the prompt a stop string begins."""
        if not asked.stop:
            return None
        text = self.reply(asked.prompt, made, echoed=asked.echo)
        found = [
            (text.find(stop) + len(stop), text.find(stop)) for stop in asked.stop if stop in text
        ]
        return min(found)[1] if found else None

    def _text(self, asked: Asked, answer: Answer, made: Sequence[int]) -> str:
        reason = answer.finished.reason
        textual = list(made)
        if reason in (pb.FINISH_REASON_STOP_TOKEN, pb.FINISH_REASON_END_OF_SEQUENCE):
            textual.pop()
        wanted = self.reply(asked.prompt, textual, echoed=asked.echo)
        if reason == pb.FINISH_REASON_STOP_STRING:
            wanted = wanted[: self._stopped(asked, textual)]
        if asked.resume:
            return ""  # what of it was sent before is not told here
        if asked.echo:
            wanted = self.decode(asked.prompt).rstrip("\N{REPLACEMENT CHARACTER}") + wanted
        return "" if answer.text == wanted else f"text {answer.text!r}, must be {wanted!r}"

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def reply(self, prompt: Sequence[int], made: Sequence[int], *, echoed: bool = False) -> str:
        """The text of both, less what it has in common with that of the prompt.

        ``echoed``: less what was sent of it, which does not end within a character.
        """
        whole, before = self.decode([*prompt, *made]), self.decode(prompt)
        if echoed:
            before = before.rstrip("\N{REPLACEMENT CHARACTER}")
        return whole[shared_length(before, whole) :]


def shared_length(one: str, other: str) -> int:
    """How many first characters two texts have in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _largest(scores: Tensor) -> float:
    """Of what is not forbidden, and at least one."""
    return max(1.0, float(scores[scores > -torch.inf].abs().max()))


def _near(decoding: Decoding) -> list[Decoding]:
    """Decodings whose cuts keep a hair less, and a hair more."""
    return [
        replace(
            decoding,
            top_p=min(1.0, decoding.top_p * factor),
            min_p=decoding.min_p * factor,
        )
        for factor in (1 - CLOSE, 1 + CLOSE)
    ]
