"""Three real processes over unix sockets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from outrider.coordinator.local.private_stack import deployment
from outrider.shared.config.schema import load


@pytest.fixture(scope="session")
def bundled_target() -> Iterator[str]:
    """A running coordinator with the pair that ships."""
    with deployment(load(None, flags={})) as target:
        yield target


@pytest.fixture
def tiny_target(tiny_base: Path, tiny_draft: Path) -> Iterator[str]:
    """A running coordinator with a tiny random pair."""
    config = load(None, flags={})
    config = dataclasses.replace(
        config,
        base=dataclasses.replace(config.base, path=str(tiny_base)),
        draft=dataclasses.replace(config.draft, path=str(tiny_draft)),
        coordinator=dataclasses.replace(config.coordinator, tokenizer=str(tiny_base)),
    )
    with deployment(config) as target:
        yield target
