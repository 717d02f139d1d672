"""What was found out about this machine, kept so that the next start need not.

A file holds what it was found for (processor, versions, sizes) beside what was found; another
machine that shares the folder, or this one after an update, finds out for itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def cache_folder(asked: str | None = None) -> Path:
    """The folder for compiled kernels and what was found out: ``asked``, else the user's own."""
    if asked is not None:
        return Path(asked).expanduser()
    own = os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own) / "outrider"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "outrider"
    return Path.home() / ".cache" / "outrider"


def found(
    folder: Path, what: str, circumstances: Mapping[str, Any], find: Callable[[], Any]
) -> Any:
    """What ``find`` returned when it was last called in these ``circumstances``; else calls it.

    ``what`` names the kind of thing; both it and what is found must be JSON.
    """
    whole = {"what": what, **circumstances}
    name = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:32]
    place = folder / f"{what}-{name}.json"
    try:
        kept = json.loads(place.read_text("utf-8"))
        if kept["circumstances"] == json.loads(json.dumps(whole)):
            return kept["found"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    result = find()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own = place.with_suffix(f".{os.getpid()}")
        own.write_text(json.dumps({"circumstances": whole, "found": result}), "utf-8")
        own.replace(place)
    except OSError as error:
        log.info("what was found can't be kept in %s: %s", folder, error)
    return result
