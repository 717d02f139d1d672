"""Deterministic seeding of Python, NumPy and PyTorch, in one place.

Outrider's own output needs none of it: its noise is a pure function of (seed, position, token
id). This is for what surrounds it, such as training, benchmarks and random test models.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping

from outrider.shared.core.errors import ConfigError

VARIABLE = "OUTRIDER_SEED"


def seed_everything(seed: int, *, deterministic: bool = False) -> None:
    """Seeds Python's ``random``, NumPy and PyTorch (all devices) with ``seed`` in [0, 2**64).

    ``deterministic`` also asks PyTorch for deterministic algorithms; operations that have none
    then raise. NumPy's legacy generator takes 32 bits and gets the lower ones.
    """
    if not 0 <= seed < 2**64:
        raise ConfigError(f"seed = {seed}; must be a whole number from 0 to 2**64 - 1")
    random.seed(seed)
    import numpy as np

    np.random.seed(seed % 2**32)
    import torch

    # torch.manual_seed covers CUDA, MPS and every other device it knows.
    torch.manual_seed(seed if seed < 2**63 else seed - 2**64)
    if deterministic:
        # cuBLAS reads this when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def seed_from(flag: int | None = None, environment: Mapping[str, str] | None = None) -> int | None:
    """The seed in force: ``flag``, else ``OUTRIDER_SEED``, else None; raises ``ConfigError``."""
    if flag is not None:
        return flag
    text = (os.environ if environment is None else environment).get(VARIABLE, "").strip()
    if not text:
        return None
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**64:
        raise ConfigError(
            f"environment variable {VARIABLE} = {text!r}; "
            "must be a whole number from 0 to 2**64 - 1"
        )
    return seed


def seed_if_asked(flag: int | None = None, environment: Mapping[str, str] | None = None) -> bool:
    """Seeds everything when a flag or the environment asks for it; returns whether it did."""
    seed = seed_from(flag, environment)
    if seed is None:
        return False
    seed_everything(seed)
    return True
