"""What a GPU of 16 GB has room for, on any larger one: float16, and the process's memory capped."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from outrider.coordinator.bench.models import planted
from outrider.draft_service.engine import DraftEngine
from outrider.shared.config.schema import ModelConfig
from outrider.shared.model.loading import make_runner
from outrider.verify_service.engine import VerifyEngine
from outrider_testing import engines

pytestmark = pytest.mark.gpu
GIB = 1 << 30
CAP = 15 * GIB
SEQUENCES, TOKENS, WRITTEN, K = 4, 4096, 100, 2
ROOM = TOKENS + 16
"""Of a sequence, with what a proposal needs beyond its end."""
KV_BYTES = {"llama-3.2-3b": 28 * 2 * 8 * 128 * 2, "llama-3.2-1b": 16 * 2 * 8 * 64 * 2}
"""Of a token: layers, keys and values, heads, their width, bytes."""


@pytest.fixture
def capped() -> Iterator[None]:
    """A process that may have no more device memory than ``CAP``."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(CAP / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def runner(shape: str, agreement: float | None = None) -> Any:
    """A planted model on the device, with an arena that just holds the sequences."""
    model = planted.plant(planted.PlantSpec(shape, agreement=agreement, dtype="float16"), "cuda")
    config = ModelConfig(
        path=shape, device="cuda", max_k=K, arena_bytes=SEQUENCES * ROOM * KV_BYTES[shape]
    )
    made = make_runner(model, config)
    assert made.facts.runner == "cuda"
    gc.collect()
    torch.cuda.empty_cache()
    return made


def test_pair_of_3b_and_1b_with_four_long_sequences_fits_in_15_gib(capped: None) -> None:
    base = VerifyEngine(runner("llama-3.2-3b"), K)
    draft = DraftEngine(runner("llama-3.2-1b", 0.8), K)
    generator = torch.Generator().manual_seed(0)
    vocabulary = planted.SHAPES["llama-3.2-3b"].vocabulary
    prompts = [
        torch.randint(0, vocabulary, (TOKENS - WRITTEN - K,), generator=generator).tolist()
        for _ in range(SEQUENCES)
    ]
    alone = engines.speculate(base, None, prompts, WRITTEN, 0)
    courses = engines.speculate(base, draft, prompts, WRITTEN, K)
    successor = planted.cycle(vocabulary, 0).tolist()
    for one, plain in zip(courses, alone, strict=True):
        assert one.written[:WRITTEN] == plain.written[:WRITTEN]
        pairs = zip(one.log[one.prompt_len - 1 :], one.written, strict=False)
        assert all(successor[before] == token for before, token in pairs)
    peak = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    print(f"peak: {peak[0] / GIB:.2f} GiB allocated, {peak[1] / GIB:.2f} reserved")
    assert peak[1] <= CAP
    rate = sum(one.accepted for one in courses) / sum(one.proposed for one in courses)
    assert rate == pytest.approx((0.8 + 0.8**2) / 2, abs=0.1)
