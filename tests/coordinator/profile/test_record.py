"""The record that is built of what a coordinator tells of one request."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from outrider.coordinator.profile.html import page
from outrider.coordinator.profile.record import build
from outrider.protos import generation_pb2 as pb
from outrider.shared.core.model_facts import EngineInfo, ModelFacts, write_description

BASE = ModelFacts(
    name="/home/someone/models/base-7b",
    architecture="LlamaForCausalLM",
    parameters=7 * 10**9,
    weight_bytes=14 * 10**9,
    vocab_size=320,
    vocab_fingerprint="ab" * 32,
    max_positions=4096,
    device="cuda:0",
    dtype="bfloat16",
    eos_token_ids=(2, 7),
    runner="cuda",
)
DRAFT = replace(BASE, name="org/draft", weight_bytes=10**9)
TEXT = {
    "prompt": "p", "text": "abc", "token_ids": [1, 2, 3], "pieces": ["a", "b", "c"],
    "origins": ["accepted", "accepted", "bonus"], "deltas": [], "prompt_tokens": 1, "seed": 7,
}  # fmt: skip


def service(facts: ModelFacts, speed: float) -> pb.ServiceProfile:
    model = write_description(EngineInfo(facts, 1000, 10, 0, 990, 1000, 1, 0, 8))
    return pb.ServiceProfile(
        model=model, arena_tokens_largest_free=990, resident_bytes=1 << 20, memory_bandwidth=speed
    )


@pytest.fixture
def told() -> pb.ProfileResponse:
    """One round: two of two proposed tokens accepted, 10 ms."""
    verify = pb.ExchangeProfile(
        sent_ns=10**9 + 2 * 10**6,
        answered_ns=10**9 + 9 * 10**6,
        model_seconds=5e-3,
        service_seconds=6e-3,
        rows=3,
    )
    one = pb.RoundProfile(
        round=1, started_ns=10**9, finished_ns=10**9 + 10**7, verify=verify, committed_len=4, k=2,
        proposed=2, accepted=2, emitted=3, rows=3, batch_size=1,
    )  # fmt: skip
    return pb.ProfileResponse(
        rounds=[one],
        base=service(BASE, 1e12),
        draft=service(DRAFT, 1e12),
        arrived_ns=10**9,
        admitted_ns=10**9,
        first_token_ns=10**9 + 10**7,
        finished_ns=10**9 + 10**7,
        link="shm",
    )


def test_record_describes_models_by_all_their_facts(told: pb.ProfileResponse) -> None:
    made: dict[str, Any] = json.loads(json.dumps(build(told, TEXT)))
    # JSON has no tuples, and whose machine it was is nobody's business.
    listed = {"eos_token_ids": [2, 7]}
    assert made["models"]["base"] == asdict(BASE) | listed | {"name": "base-7b"}
    assert made["models"]["draft"] == asdict(DRAFT) | listed
    assert made["memory"]["base"] == {
        "resident_bytes": 1 << 20,
        "arena_tokens": 1000,
        "arena_tokens_used": 10,
        "arena_tokens_largest_free": 990,
    }


def test_record_compares_its_rounds_with_what_memory_allows(told: pb.ProfileResponse) -> None:
    ceiling = build(told, TEXT)["ceiling"]
    # On one device: 14 GB for the verify and twice 1 GB for the proposal at 1 TB/s, 3 tokens.
    assert ceiling["tokens_per_second"] == pytest.approx(3 / 16e-3)
    assert ceiling["base_alone_tokens_per_second"] == pytest.approx(1 / 14e-3)
    assert ceiling["measured_tokens_per_second"] == pytest.approx(3 / 10e-3)


def test_record_without_a_draft_makes_a_page(told: pb.ProfileResponse) -> None:
    told.ClearField("draft")
    made = build(told, TEXT)
    assert set(made["models"]) == {"base"} and set(made["memory"]) == {"coordinator", "base"}
    assert "base-7b" in page(made)
