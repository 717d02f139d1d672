"""From what a path asks for to a paced runner."""

from __future__ import annotations

import torch

from outrider.shared.config.schema import ModelConfig
from outrider.shared.core.errors import ConfigError
from outrider.shared.core.model_facts import ModelFacts
from outrider.shared.kv.storage import Storage, shared_pools
from outrider.shared.model.paced.runner import KIND, PacedRunner
from outrider.shared.model.paced.spec import PacedSpec
from outrider.shared.model.vocabulary import fingerprint

POSITIONS = 8192
"""Longest sequence where the configuration names none."""


def load_paced(spec: PacedSpec, config: ModelConfig, budget: int) -> PacedRunner:
    """The runner with its arena of ``budget`` bytes at most. Raises ``ConfigError``."""
    if config.device not in ("auto", "cpu"):
        raise ConfigError(f"device: got {config.device}; a paced model is on cpu")
    positions = config.max_positions or POSITIONS
    facts = ModelFacts(
        name=config.path,
        architecture="Paced",
        parameters=0,
        weight_bytes=0,
        vocab_size=spec.vocab,
        vocab_fingerprint=fingerprint("", spec.vocab),
        max_positions=positions,
        device="cpu",
        dtype="float32",
        eos_token_ids=(),
        runner="paced",
        kernels=config.path,
    )
    pools = shared_pools(
        [KIND],
        budget=budget,
        itemsize=torch.float32.itemsize,
        max_sequences=config.max_sequences,
        slack=config.max_k + 1,
        max_positions=positions + config.max_k + 1,
    )
    device = torch.device("cpu")
    return PacedRunner(spec, facts, Storage([KIND], pools, dtype=torch.float32, device=device))
