"""Finds what a model's name means, without loading anything: a wrong one is told at once."""

from __future__ import annotations

from pathlib import Path

from outrider.shared import pair
from outrider.shared.core.errors import ConfigError
from outrider.shared.model.paced.spec import parse


def model_path(name: str) -> str:
    """The folder or hub id that ``name`` means; ``base`` and ``draft`` are the bundled pair.

    A paced model (``paced:…``) stays as it is. Raises ``ConfigError`` for a folder that is not
    there or holds no model, and for a paced model that can't be.
    """
    if parse(name) is not None:
        return name
    if name in pair.NAMES and not Path(name).exists():
        try:
            return str(pair.path(name))
        except FileNotFoundError as error:
            raise ConfigError(f"path: {error}") from error
    folder = Path(name).expanduser()
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"path: {name} holds no model: expected a folder with config.json and weights "
                "(*.safetensors) as transformers saves them"
            )
        return str(folder)
    # A hub id is "name" or "owner/name"; anything else was meant as a folder.
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(
            f"path: {name} does not exist: expected a folder with config.json and weights, a hub "
            "id (owner/name), 'base' or 'draft'"
        )
    return name
