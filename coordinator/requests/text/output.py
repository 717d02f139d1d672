"""From committed tokens to what a client reads: text, stops, and a queue that can't grow.

The round loop only appends to plain lists; text is made when the client's call comes to fetch
it, outside the critical path, unless stop strings need it to decide the next round. What a
slow reader has not fetched is merged into one delta, so a sample holds at most its own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from outrider.coordinator.requests.text.detokenize import Decoder, Detokenizer, finished
from outrider.coordinator.requests.text.stop_strings import StopStrings
from outrider.coordinator.requests.text.stopping import Finish, FinishReason, TokenStops
from outrider.protos import generation_pb2 as pb
from outrider.shared.core.types import PositionLogprobs


class Output:
    """The output of one sample."""

    def __init__(
        self,
        decoder: Decoder | None,
        prompt_ids: Sequence[int],
        *,
        stop_strings: Sequence[str] = (),
        stops: TokenStops,
        echo: str | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """``echo``: the text of the prompt, which is sent first.

        ``wake`` is called whenever there is something to fetch.
        """
        self._text: Detokenizer | None = None
        self._special: Mapping[int, str] = {}
        if decoder is not None:
            self._text = Detokenizer(decoder, prompt_ids, echoed=echo is not None)
            self._special = decoder.special_tokens()
        self._strings = StopStrings(stop_strings)
        # Special tokens that stand in text that is still to come, and after how much of it.
        self._waiting: list[tuple[int, str]] = []
        self._reach = max((len(stop) for stop in stop_strings), default=0)
        self._eager = bool(stop_strings)
        self._stops = stops
        self._wake = wake
        self._undecoded: list[int] = []
        self._pieces: list[str] = [finished(echo)] if echo else []
        self._tokens: list[int] = []
        self._origins: list[int] = []
        self._logprobs: list[PositionLogprobs] = []
        self.finish: Finish | None = None
        self.emitted = 0
        """Tokens that belong to the output, resumed ones not counted."""

    @property
    def left(self) -> int:
        """Tokens that may still be emitted."""
        return self._stops.left

    def resume(self, tokens: Sequence[int]) -> None:
        """Takes in tokens that the client already has; what it has of their text is not sent.

        Ends the sample where they already hold its end.
        """
        for token in tokens:
            if self.finish is not None:
                break
            self._take([token], eager=True)
        self._pieces.clear()
        if self.finish is None and not self.left:
            self.finish = Finish(FinishReason.MAX_TOKENS)

    def push(
        self,
        tokens: Sequence[int],
        origins: Sequence[int],
        logprobs: Sequence[PositionLogprobs] = (),
    ) -> Finish | None:
        """Takes in the tokens of one verdict; returns the end if it is among them.

        Tokens after the end are dropped.
        """
        taken = self._take(tokens, eager=self._eager)
        self._tokens.extend(tokens[:taken])
        self._origins.extend(origins[:taken])
        self._logprobs.extend(logprobs[:taken])
        self.emitted += taken
        self._wake()
        return self.finish

    def end(self, finish: Finish) -> None:
        """Ends the sample from outside (cancelled, deadline); the first end stands."""
        if self.finish is None:
            self.finish = finish
        self._wake()

    def fetch(self) -> pb.Delta | None:
        """Everything since the last fetch as one delta, or None; after the end, the very rest."""
        self._decode()
        if self.finish is not None:
            self._close()
        if not (self._tokens or self._pieces):
            return None
        delta = pb.Delta(
            text="".join(self._pieces),
            token_ids=self._tokens,
            origins=self._origins,  # type: ignore[arg-type]
            logprobs=[_logprobs_message(one) for one in self._logprobs],
        )
        self._pieces = []
        self._tokens = []
        self._origins = []
        self._logprobs = []
        return delta

    def _take(self, tokens: Sequence[int], *, eager: bool) -> int:
        """How many of ``tokens`` belong to the output; sets ``finish`` where they end it."""
        taken, finish = self._stops.push(tokens)
        # The token that ends the text is not text itself.
        ended_by_token = finish is not None and finish.stop_token_id is not None
        textual = tokens[: taken - 1] if ended_by_token else tokens[:taken]
        if not eager:
            self._undecoded.extend(textual)
        else:
            for index, token in enumerate(textual):
                stop = self._take_text(token)
                if stop is not None:
                    self.finish = Finish(FinishReason.STOP_STRING, stop_string=stop)
                    return index + 1
        self.finish = finish
        return taken

    def _take_text(self, token: int) -> str | None:
        """Takes in the text of one token; the stop string that it completes, if it does."""
        if self._text is None:
            return None
        stop = self._release(self._text.push((token,)))
        if stop is not None or not self._eager:
            return stop
        special, coming = self._special.get(token), self._text.peek()
        for index in range(len(self._waiting) - 1, -1, -1):
            if self._waiting[index][0] <= len(coming):
                break
            # It stood within a character, which was told as one U+FFFD for each byte.
            self._waiting[index] = (len(coming), self._waiting[index][1])
        if special is not None:
            self._waiting.append((len(coming), special))
        # An end within a character is no text yet, unless a special token comes after it.
        elif finished(coming) != coming:
            return None
        if (special is not None and not coming) or self._completes(coming):
            # It is the text of the tokens so far: no later byte will change it any more.
            return self._release(coming)
        return None

    def _decode(self) -> None:
        if self._undecoded:
            if self._text is not None:
                self._release(self._text.push(self._undecoded))
            self._undecoded.clear()

    def _completes(self, coming: str) -> bool:
        """Whether a stop string would be complete with ``coming`` and what waits in it.

        It was not before the last token, so only the end is looked at.
        """
        if not coming:
            return False
        first, end = max(0, len(coming) - self._reach), len(coming)
        pieces: list[tuple[str, bool]] = []
        for place, special in reversed(self._waiting[-self._reach :]):
            if place < first:
                break
            pieces += ((coming[place:end], False), (special, True))
            end = place
        pieces.append((coming[first:end], False))
        return self._strings.completes(pieces[::-1], after_held=not first)

    def _release(self, text: str) -> str | None:
        """Releases ``text``, and the special tokens that waited for it, up to a stop string."""
        done = passed = 0
        stop: str | None = None
        for place, special in self._waiting:
            if place > len(text) or stop is not None:
                break
            stop = self._pass(text[done:place])
            if stop is None:
                stop = self._pass(special, special=True)
            done, passed = place, passed + 1
        if stop is None:
            stop = self._pass(text[done:])
        if self._waiting and (text or passed):
            rest = self._waiting[passed:]
            self._waiting = [(place - len(text), special) for place, special in rest]
        return stop

    def _pass(self, text: str, *, special: bool = False) -> str | None:
        if not text:
            return None
        strings = self._strings
        released, stop = strings.push_special(text) if special else strings.push(text)
        if released:
            self._pieces.append(released)
        return stop

    def _close(self) -> None:
        """Releases what was held back, once; after a stop string there is nothing to release."""
        if self._text is None or self.finish is None:
            return
        if self.finish.reason is not FinishReason.STOP_STRING:
            stop = self._release(self._text.flush())
            if stop is None:
                self._release_held()
            else:
                self.finish = Finish(FinishReason.STOP_STRING, stop_string=stop)
        self._text = None

    def _release_held(self) -> None:
        held = self._strings.flush()
        if held:
            self._pieces.append(held)


def _logprobs_message(one: PositionLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        logprob=one.logprob,
        top=[pb.TokenLogprob(token_id=token, logprob=value) for token, value in one.top],
    )
