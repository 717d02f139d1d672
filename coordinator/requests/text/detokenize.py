"""Token ids to text, a few at a time, exactly.

The window method of TGI (``prefix_offset`` / ``read_offset``) and of vLLM's incremental
detokenizer: decode a short window of the last tokens, emit what is new, let the window slide.
Three rules make the concatenation of all deltas *equal* to decoding everything at once:

1. A trailing U+FFFD may be the first bytes of a character that is still to come, so it is held
   back. Only the last one can be: lossy UTF-8 decoding gives one U+FFFD for a truncated
   character, and everything before it is final.
2. Byte-fallback decoders (SentencePiece models) decode a whole run of ``<0x..>`` tokens
   together, and one bad byte spoils the whole run, so a run is held back until a token with a
   text of its own closes it.
3. The window slides only to a place where the decoding of the shorter window is a suffix of the
   decoding of the longer one, with at least one emitted character in it. UTF-8 synchronises
   itself (a lead byte is never a continuation byte) and the decoders look at the start of the
   text only, so from such a place on both windows decode alike.

Cost: every token is decoded at most about ``WINDOW / KEEP`` times, whatever the length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

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


class Detokenizer:
    """The text of a growing list of tokens.

    ``context``: tokens before the first one to be emitted (the prompt). Their text is not
    emitted, but decides about a leading space, and about a character that began in them.
    """

    __slots__ = ("_closed", "_decoder", "_emitted", "_patience", "_window")

    def __init__(self, decoder: Decoder, context: Sequence[int] = ()) -> None:
        self._decoder = decoder
        self._window: list[int] = []
        self._closed = 0  # tokens of the window that are not part of an open byte run
        self._emitted = 0  # characters of the window's text that are out
        self._patience = WINDOW
        # A long context is cut where the text of the cut is a suffix of the text of the whole;
        # a context of a few windows is enough to find such a place.
        self.push(context[-4 * WINDOW :])

    def push(self, ids: Iterable[int]) -> str:
        """Takes in ``ids``; returns the text that is final and was not returned before."""
        window = self._window
        before = self._closed
        window.extend(ids)
        closed = len(window)
        while closed > before and self._decoder.keeps_run_open(window[closed - 1]):
            closed -= 1
        if closed == before:
            return ""
        self._closed = closed
        text = self._decoder.decode(window[:closed])
        final = len(text) - text.endswith(_REPLACEMENT)
        delta = text[self._emitted : final]
        self._emitted = max(self._emitted, final)
        if closed > self._patience:
            self._slide(text)
        return delta

    def flush(self) -> str:
        """The rest of the text, when no token comes any more; an unfinished character is U+FFFD."""
        text = self._decoder.decode(self._window)
        delta = text[self._emitted :]
        self._emitted = len(text)
        return delta

    def _slide(self, text: str) -> None:
        start = self._closed - KEEP
        shorter = self._decoder.decode(self._window[start : self._closed])
        emitted = self._emitted - (len(text) - len(shorter))
        if emitted > 0 and text.endswith(shorter) and self._is_border(start, shorter, text):
            del self._window[:start]
            self._closed = KEEP
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
