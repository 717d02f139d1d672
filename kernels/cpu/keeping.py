"""Files in the cache folder: there as a whole or not at all."""

from __future__ import annotations

import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)


def keep(place: Path, content: bytes) -> None:
    """Writes ``place``, with its folder; where that can't be done the log says so."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        # Two services may start at once: each writes a file of its own, the last name stays.
        own = place.with_suffix(f".{os.getpid()}")
        own.write_bytes(content)
        own.replace(place)
    except OSError as error:
        log.info("nothing can be kept in %s: %s", place.parent, error)
