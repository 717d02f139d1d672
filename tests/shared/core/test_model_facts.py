"""The one description of a model, from the dataclass to the message and back."""

from __future__ import annotations

from dataclasses import fields

import pytest

from outrider.protos.generation_pb2 import ModelDescription
from outrider.shared.core.model_facts import (
    EngineInfo,
    ModelFacts,
    model_name,
    read_description,
    write_description,
)

FACTS = ModelFacts(
    name="org/model",
    architecture="LlamaForCausalLM",
    parameters=2**33,
    weight_bytes=2**34,
    vocab_size=320,
    vocab_fingerprint="ab" * 32,
    max_positions=1 << 20,
    device="cuda:0",
    dtype="bfloat16",
    eos_token_ids=(2, 7),
    runner="cuda",
)


def test_description_of_facts_reads_back_as_them() -> None:
    message = write_description(EngineInfo(FACTS, 100, 60, 5, 30, 100, 2, 1, 8))
    assert (message.arena_tokens, message.arena_tokens_used) == (100, 60)
    assert message.arena_tokens_cached == 5
    assert read_description(ModelDescription.FromString(message.SerializeToString())) == FACTS


def test_description_has_a_field_for_every_fact_and_the_arena() -> None:
    arena = {"arena_tokens", "arena_tokens_used", "arena_tokens_cached", "arena_longest"}
    facts = {one.name for one in fields(ModelFacts)}
    assert set(ModelDescription.DESCRIPTOR.fields_by_name) == facts | arena


@pytest.mark.parametrize(
    ("path", "name"),
    [("/home/x/models/llama", "llama"), ("org/model", "org/model"), ("base", "base")],
)
def test_model_names_hold_no_folders_of_the_machine(path: str, name: str) -> None:
    assert model_name(path) == name
