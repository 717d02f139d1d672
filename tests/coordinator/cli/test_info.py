"""``outrider info``, without a coordinator."""

from __future__ import annotations

import json

from outrider.coordinator.cli.info import _fields
from outrider.protos import generation_pb2 as pb


def test_info_json_has_every_field_and_none_for_what_is_unset() -> None:
    base = pb.ModelDescription(name="m", eos_token_ids=[2, 7])
    made = json.loads(json.dumps(_fields(pb.InfoResponse(base=base, max_k=8))))
    assert set(made) == set(pb.InfoResponse.DESCRIPTOR.fields_by_name)
    assert set(made["base"]) == set(pb.ModelDescription.DESCRIPTOR.fields_by_name)
    assert (made["base"]["name"], made["base"]["eos_token_ids"]) == ("m", [2, 7])
    assert (made["max_k"], made["draft"]) == (8, None)
