"""What the command line shows: progress while loading, text as it comes, figures at the end."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from outrider.protos import generation_pb2 as pb

_CLEAR = "\r\x1b[K"
_RESET = "\x1b[0m"
_COLORS = {
    pb.TOKEN_ORIGIN_ACCEPTED: "\x1b[32m",  # green: the draft wrote it, the base agreed
    pb.TOKEN_ORIGIN_CORRECTED: "\x1b[31m",  # red: the base wrote it over the draft
    pb.TOKEN_ORIGIN_BONUS: "\x1b[36m",  # cyan: the base's own, after a whole proposal
    pb.TOKEN_ORIGIN_BASE: "",
}


class Progress:
    """What each part is doing: one line that changes on a terminal, else a line per change."""

    def __init__(self, stream: TextIO) -> None:
        """``stream`` is standard error."""
        self._stream = stream
        self._live = stream.isatty()
        self._states: dict[str, str] = {}

    def __call__(self, name: str, text: str) -> None:
        """``name`` now does ``text``."""
        if self._states.get(name) == text:
            return
        self._states[name] = text
        if self._live:
            line = "   ".join(f"{part}: {state}" for part, state in self._states.items())
            self._write(_CLEAR + line[: shutil.get_terminal_size().columns - 1])
        else:
            self._write(f"{name}: {text}\n")

    def clear(self) -> None:
        """Takes the line away."""
        if self._live and self._states:
            self._write(_CLEAR)
        self._states.clear()

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._live = False  # nobody watches


class Painter:
    """Colours text by who wrote its tokens.

    A delta's text does not say where one token ends and the next begins, so the tokens are
    decoded once more here, one by one. Only the colours depend on it, never the text.
    """

    def __init__(self, push: Callable[[Sequence[int]], str]) -> None:
        """``push`` is ``Detokenizer.push``."""
        self._push = push
        self._runs: deque[tuple[int, pb.TokenOrigin]] = deque()  # characters, origin

    def paint(self, delta: pb.Delta) -> str:
        """The delta's text with colours."""
        for token, origin in zip(delta.token_ids, delta.origins, strict=False):
            length = len(self._push((token,)))
            if self._runs and self._runs[-1][1] == origin:
                length += self._runs.pop()[0]
            if length:
                self._runs.append((length, origin))
        text = delta.text
        pieces = []
        while text and self._runs:
            length, origin = self._runs.popleft()
            piece, text = text[:length], text[length:]
            if len(piece) < length:
                self._runs.appendleft((length - len(piece), origin))
            color = _COLORS.get(origin, "")
            pieces.append(f"{color}{piece}{_RESET}" if color else piece)
        return "".join(pieces) + text


def legend() -> str:
    """What the colours mean."""
    return (
        f"{_COLORS[pb.TOKEN_ORIGIN_ACCEPTED]}accepted from the draft{_RESET}  "
        f"{_COLORS[pb.TOKEN_ORIGIN_CORRECTED]}corrected by the base{_RESET}  "
        f"{_COLORS[pb.TOKEN_ORIGIN_BONUS]}added by the base{_RESET}"
    )


def reason_name(reason: int) -> str:
    """``FINISH_REASON_MAX_TOKENS`` as ``max_tokens``."""
    name = str(pb.FinishReason.Name(reason))
    return name.removeprefix("FINISH_REASON_").lower()


class Sample:
    """One sample of a request, gathered from its messages."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.origins: list[int] = []
        self.logprobs: list[pb.TokenLogprobs] = []
        self.finished: pb.Finished | None = None

    def add(self, delta: pb.Delta) -> None:
        """Takes in the next delta."""
        self.texts.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.origins.extend(delta.origins)
        self.logprobs.extend(delta.logprobs)

    def headed(self, index: int) -> str:
        """Its text under a line that tells it from the others."""
        assert self.finished is not None
        return f"== sample {index}, seed {self.finished.seed} ==\n{''.join(self.texts)}"

    def statistics(self) -> str:
        """The figures for a person."""
        assert self.finished is not None
        return statistics(self.finished, self.origins)

    def as_json(self) -> dict[str, Any]:
        """The object of ``--json``."""
        assert self.finished is not None
        made = as_json("".join(self.texts), self.token_ids, self.finished)
        if self.logprobs:
            made["logprobs"] = [
                {
                    "logprob": one.logprob,
                    "top": [{"token_id": top.token_id, "logprob": top.logprob} for top in one.top],
                }
                for one in self.logprobs
            ]
        return made


def as_json(text: str, token_ids: Sequence[int], finished: pb.Finished) -> dict[str, Any]:
    """The one object of ``--json``."""
    made: dict[str, Any] = {
        "text": text,
        "token_ids": list(token_ids),
        "finish_reason": reason_name(finished.reason),
    }
    if finished.stop_string:
        made["stop_string"] = finished.stop_string
    if finished.HasField("stop_token_id"):
        made["stop_token_id"] = finished.stop_token_id
    speculation = finished.speculation
    seconds = speculation.seconds
    return made | {
        "usage": {
            "prompt_tokens": finished.usage.prompt_tokens,
            "cached_prompt_tokens": finished.usage.cached_prompt_tokens,
            "completion_tokens": finished.usage.completion_tokens,
        },
        "seed": finished.seed,
        "speculation": {
            "rounds": speculation.rounds,
            "proposed": speculation.proposed,
            "accepted": speculation.accepted,
            "acceptance_rate": speculation.acceptance_rate,
            "mean_accepted_length": speculation.mean_accepted_length,
            "proposed_per_position": list(speculation.proposed_by_position),
            "accepted_per_position": list(speculation.accepted_by_position),
            "seconds": {
                name: getattr(seconds, name)
                for name in ("queue", "prefill", "draft", "verify", "overhead", "total")
            },
        },
    }


def statistics(finished: pb.Finished, origins: Sequence[int]) -> str:
    """The figures for a person."""
    made = finished.usage.completion_tokens
    s, t = finished.speculation, finished.speculation.seconds
    lines = [
        f"{made} tokens in {t.total:.2f} s ({made / t.total if t.total else 0:.1f} tokens/s), "
        f"first after {1e3 * (t.queue + t.prefill):.0f} ms, "
        f"ended by {reason_name(finished.reason)}, seed {finished.seed}",
    ]
    if finished.usage.cached_prompt_tokens:
        lines.append(
            f"{finished.usage.cached_prompt_tokens} of {finished.usage.prompt_tokens} tokens of "
            "the prompt were cached"
        )
    if s.proposed:
        share = sum(one == pb.TOKEN_ORIGIN_ACCEPTED for one in origins) / max(1, len(origins))
        positions = " ".join(
            f"{accepted / proposed:.0%}"
            for accepted, proposed in zip(
                s.accepted_by_position, s.proposed_by_position, strict=False
            )
            if proposed
        )
        lines += [
            f"the draft wrote {share:.0%} of the tokens: {s.accepted} of {s.proposed} proposed "
            f"were accepted ({s.acceptance_rate:.0%}), {s.mean_accepted_length:.2f} tokens a round",
            f"accepted by position: {positions}",
        ]
    else:
        lines.append("no speculation: the base wrote every token")
    rounds = max(1, s.rounds)
    lines.append(
        f"{s.rounds} rounds; a round: draft {1e3 * t.draft / rounds:.2f} ms, "
        f"verify {1e3 * t.verify / rounds:.2f} ms, overhead {1e3 * t.overhead / rounds:.2f} ms"
    )
    return "\n".join(lines)
