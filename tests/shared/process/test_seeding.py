from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from outrider.shared.core.errors import ConfigError
from outrider.shared.process.seeding import seed_everything, seed_from, seed_if_asked


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, 2**64 - 1])
def test_seeding_repeats_all_three_generators(seed: int) -> None:
    seed_everything(seed)
    first = draws()
    assert draws() != first
    seed_everything(seed)
    assert draws() == first


def test_seeding_tells_seeds_apart() -> None:
    seed_everything(1)
    first = draws()
    seed_everything(2)
    assert all(a != b for a, b in zip(first, draws(), strict=True))


def test_seeding_deterministic_asks_for_deterministic_algorithms() -> None:
    try:
        seed_everything(1, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_seeding_flag_goes_before_environment() -> None:
    assert seed_from(None, {}) is None
    assert seed_from(None, {"OUTRIDER_SEED": "7"}) == 7
    assert seed_from(0, {"OUTRIDER_SEED": "7"}) == 0
    assert not seed_if_asked(None, {})
    assert seed_if_asked(None, {"OUTRIDER_SEED": "7"})
    first = draws()
    seed_everything(7)
    assert draws() == first


@pytest.mark.parametrize("text", ["-1", "x", "1.5", str(2**64)])
def test_seeding_bad_seeds_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="OUTRIDER_SEED"):
        seed_from(None, {"OUTRIDER_SEED": text})


def test_seeding_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="seed = -1"):
        seed_everything(-1)
