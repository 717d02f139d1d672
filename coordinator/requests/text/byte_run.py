"""The text of an open run of byte tokens, told a byte at a time.

``ByteFallback`` decodes a run as a whole: to its characters where all of its bytes are UTF-8,
else to one U+FFFD for each byte. Asking the decoder again after every byte would take time in
the square of the run's length.
"""

from __future__ import annotations

from codecs import getincrementaldecoder

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class ByteRun:
    """A run of byte tokens that may go on."""

    __slots__ = ("_characters", "_decoder", "_lead", "_length", "_spoiled")

    def __init__(self) -> None:
        self._decoder = getincrementaldecoder("utf-8")()
        self._characters = ""
        self._lead = 0
        self._length = 0
        self._spoiled = False

    def push(self, byte: int, *, dropped: bool = False) -> None:
        """Takes in one byte; ``dropped``: a space at the text's start that the decoder removes."""
        self._length += 1
        self._lead += dropped
        if not self._spoiled:
            try:
                self._characters += self._decoder.decode(bytes((byte,)))
            except UnicodeDecodeError:
                self._spoiled = True

    @property
    def text(self) -> str:
        """What the bytes so far decode to."""
        if self._spoiled or self._decoder.getstate()[0]:
            return _REPLACEMENT * self._length
        return self._characters[self._lead :]
