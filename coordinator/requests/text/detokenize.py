"""Token ids to text, a few at a time, exactly.

The window method of TGI (``prefix_offset`` / ``read_offset``) and of vLLM's incremental
detokenizer: decode a short window of the last tokens, emit what is new, let the window slide.
Four rules make the concatenation of all deltas *equal* to decoding everything at once:

1. A trailing U+FFFD may be the first bytes of a character that is still to come, so it is held
   back. Only the last one can be: lossy UTF-8 decoding gives one U+FFFD for a truncated
   character, and everything before it is final.
2. Byte-fallback decoders (SentencePiece models) decode a whole run of ``<0x..>`` tokens
   together, and one bad byte spoils the whole run, so a run is held back until a token with a
   text of its own closes it. ``peek`` tells what it says so far.
3. The window slides only to a place where the decoding of the shorter window is a suffix of the
   decoding of the longer one, with at least one emitted character in it. UTF-8 synchronises
   itself (a lead byte is never a continuation byte) and the decoders look at the start of the
   text only, so from such a place on both windows decode alike.
4. The text after a prompt is the text of both, less what that has in common with the text of
   the prompt alone. The two part before the prompt's end only where it stands within a
   character, which then belongs to what follows, or within a run that a later byte spoils.

Cost: every token is decoded at most about ``WINDOW / KEEP`` times, whatever the length.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from outrider.coordinator.requests.text.byte_run import ByteRun

WINDOW = 32
"""Tokens after which the window slides."""
KEEP = 8
"""Tokens that stay: more than the three bytes of an unfinished character can span."""
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Decoder(Protocol):
    """What is needed of a tokenizer; special tokens are left out of the text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``."""

    def keeps_run_open(self, token: int) -> bool:
        """Whether a run of byte tokens goes on through this token (see rule 2)."""

    def byte(self, token: int) -> int | None:
        """The byte that ``token`` stands for, if it is a byte token of a byte-fallback decoder."""

    def special_tokens(self) -> Mapping[int, str]:
        """The tokens that are left out of the text, as they are written."""


def finished(text: str) -> str:
    """``text`` without an end that may be the beginning of a character."""
    return text.rstrip(_REPLACEMENT)


def _common(one: str, other: str) -> int:
    """How many first characters two texts share."""
    least, most = 0, min(len(one), len(other))
    while least < most:
        middle = (least + most + 1) // 2
        if one[least:middle] == other[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least


class Detokenizer:
    """The text of a growing list of tokens.

    ``context``: tokens before the first one to be emitted (the prompt). Their text is not
    emitted, but decides about a leading space, and about a character that began in them.
    ``echoed``: its text was sent up to ``finished``, and the rest of it is emitted.
    """

    __slots__ = (
        "_before",
        "_closed",
        "_decoder",
        "_emitted",
        "_patience",
        "_run",
        "_text",
        "_window",
    )

    def __init__(
        self, decoder: Decoder, context: Sequence[int] = (), *, echoed: bool = False
    ) -> None:
        self._decoder = decoder
        self._window: list[int] = []
        self._closed = 0  # tokens of the window that are not part of an open byte run
        self._text = ""  # their text
        self._run = ByteRun()  # the others
        self._emitted = 0  # characters of the window's text that are out
        self._patience = WINDOW
        # The text of the context, until it is known where the text after it begins.
        self._before: str | None = None
        # A context of a few windows is enough; it may not begin within a run.
        start = max(0, len(context) - 4 * WINDOW)
        while start > 0 and decoder.keeps_run_open(context[start]):
            start -= 1
        if context:
            self.push(context[start:])
            before = decoder.decode(self._window)
            self._before = finished(before) if echoed else before
            self._emitted = 0

    def push(self, ids: Iterable[int]) -> str:
        """Takes in ``ids``; returns the text that is final and was not returned before."""
        window, closed = self._window, self._closed
        seen = len(window)
        for token in ids:
            window.append(token)
            if not self._decoder.keeps_run_open(token):
                closed = len(window)
        if closed == self._closed:
            self._extend_run(seen)
            return ""
        self._closed = closed
        self._text = text = self._decoder.decode(window[:closed])
        self._run = ByteRun()
        self._extend_run(closed)
        final = len(text) - text.endswith(_REPLACEMENT)
        if self._before is not None and not self._begin(text[:final]):
            return ""
        delta = text[self._emitted : final]
        self._emitted = max(self._emitted, final)
        if closed > self._patience:
            self._slide(text)
        return delta

    def peek(self) -> str:
        """The text of the tokens so far that ``push`` has not returned, since it may change."""
        if self._closed == len(self._window) and self._before is None:
            return self._text[self._emitted :]
        text = self._text + self._run.text
        return text[self._start(text) :]

    def flush(self) -> str:
        """The rest of the text, when no token comes any more; an unfinished character is U+FFFD."""
        text = self._decoder.decode(self._window)
        delta = text[self._start(text) :]
        self._before, self._emitted = None, len(text)
        return delta

    def _extend_run(self, start: int) -> None:
        """Takes the window's tokens from ``start`` on into the open run."""
        for index in range(start, len(self._window)):
            byte = self._decoder.byte(self._window[index])
            if byte is not None:
                # Some decoders remove a space at the start of a text.
                bare = byte == ord(" ") and not (self._text or self._run.text)
                dropped = bare and not self._decoder.decode(self._window[: index + 1])
                self._run.push(byte, dropped=dropped)

    def _begin(self, final: str) -> bool:
        """Whether it can be told where the text after the context begins; notes it then.

        ``final``: all text that is certain.
        """
        before = self._before or ""
        if len(final) < len(before) and before.startswith(final):
            return False
        self._emitted, self._before = self._start(final), None
        return True

    def _start(self, text: str) -> int:
        """Where in the window's text begins what was not emitted."""
        return self._emitted if self._before is None else _common(self._before, text)

    def _slide(self, text: str) -> None:
        start = self._closed - KEEP
        shorter = self._decoder.decode(self._window[start : self._closed])
        emitted = self._emitted - (len(text) - len(shorter))
        if emitted > 0 and text.endswith(shorter) and self._is_border(start, shorter, text):
            del self._window[:start]
            self._closed = KEEP
            self._text = shorter
            self._emitted = emitted
            self._patience = WINDOW
        else:
            # Tried again when the window is twice as long, so that trying stays cheap.
            self._patience = 2 * self._closed

    def _is_border(self, start: int, shorter: str, text: str) -> bool:
        """Whether a character begins where the shorter window would."""
        # A piece of a character decodes to U+FFFD; only then is a closer look needed.
        if not shorter.startswith(_REPLACEMENT):
            return True
        return self._decoder.decode(self._window[:start]) + shorter == text
