"""What was found out about this machine, kept so that the next start need not.

A file holds what it was found for (processor, versions, sizes) beside what was found; another
machine that shares the folder, or this one after an update, finds out for itself.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from outrider.kernels.cpu.keeping import keep

log = logging.getLogger(__name__)

FoundT = TypeVar("FoundT")


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
    folder: Path,
    what: str,
    circumstances: Mapping[str, Any],
    find: Callable[[], Any],
    read: Callable[[Any], FoundT],
) -> FoundT:
    """What ``find`` returned when it was last called in these ``circumstances``; else calls it.

    ``what`` names the kind of thing; both it and what is found must be JSON. ``read`` makes of it
    what is returned; a file for which it raises ``ValueError`` or ``TypeError`` is replaced.
    """
    whole = {"what": what, **circumstances}
    name = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:32]
    place = folder / f"{what}-{name}.json"
    try:
        kept = json.loads(place.read_text("utf-8"))
        if kept["circumstances"] == json.loads(json.dumps(whole)):
            return read(kept["found"])
        log.debug("%s was found elsewhere", place)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.debug("%s is of no use: %r", place, error)
    result = find()
    keep(place, json.dumps({"circumstances": whole, "found": result}).encode())
    return read(result)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Draft and base start at once; what is timed by one should not be disturbed by the other.

    Those that keep what they find in one ``folder`` take turns. Where its lock can't be had it
    goes on without.
    """
    place = folder / "timing.lock"
    with ExitStack() as stack:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(place.open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            log.debug("no lock in %s: %s", place, error)
        yield
