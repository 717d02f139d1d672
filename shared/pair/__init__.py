"""The bundled pair of checkpoints: a base model and its draft, in Hugging Face format."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any, Literal

NAMES = ("base", "draft")


def path(name: Literal["base", "draft"] | str) -> Path:
    """The folder of the bundled ``"base"`` or ``"draft"`` checkpoint.

    Raises ``ValueError`` for another name, ``FileNotFoundError`` where it was not installed.
    """
    if name not in NAMES:
        raise ValueError(f"name: got {name!r}; must be one of {', '.join(NAMES)}")
    folder = Path(str(resources.files(__name__).joinpath(name)))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the bundled {name} checkpoint is not at {folder}")
    return folder


def heldout_prompts() -> list[dict[str, Any]]:
    """Prompts from packages that the pair was not trained on; each has at least ``text``."""
    text = resources.files(__name__).joinpath("heldout_prompts.json").read_text(encoding="utf-8")
    prompts: list[dict[str, Any]] = json.loads(text)
    return prompts
