"""Server-sent events out of the pieces in which a response's body arrives."""

from __future__ import annotations


class EventReader:
    """Gathers the ``data`` of events; other fields and comments are left out."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def push(self, piece: bytes) -> list[str]:
        """The data of every event that ends within ``piece``."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        made = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if not line:
                if self._data:
                    made.append("\n".join(self._data))
                self._data = []
                continue
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" ").decode("utf-8", "replace"))
        return made
