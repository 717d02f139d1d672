"""``outrider info``, without a coordinator."""

from __future__ import annotations

import json

from outrider.coordinator.cli.info import _fields, _text
from outrider.protos import generation_pb2 as pb


def test_info_json_has_every_field_and_none_for_what_is_unset() -> None:
    base = pb.ModelDescription(name="m", eos_token_ids=[2, 7])
    made = json.loads(json.dumps(_fields(pb.InfoResponse(base=base, max_k=8))))
    assert set(made) == set(pb.InfoResponse.DESCRIPTOR.fields_by_name)
    assert set(made["base"]) == set(pb.ModelDescription.DESCRIPTOR.fields_by_name)
    assert (made["base"]["name"], made["base"]["eos_token_ids"]) == ("m", [2, 7])
    assert (made["max_k"], made["draft"]) == (8, None)


def test_info_says_of_a_draft_without_a_model_that_it_is_none() -> None:
    model = pb.ModelDescription(name="m", vocab_size=9, parameters=2_000_000, arena_tokens=8)
    draft = pb.ModelDescription(name="ngram", arena_tokens=50, arena_tokens_used=5)
    text = _text(pb.InfoResponse(base=model, draft=draft))
    assert "draft: ngram\n  no model: it proposes from the text alone\n  arena: 5 of 50" in text
    assert text.count("M parameters") == text.count("vocabulary") == 1
