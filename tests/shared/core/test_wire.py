from __future__ import annotations

import dataclasses
import struct
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.protos import speculation_pb2 as pb
from outrider.shared.core import wire
from outrider.shared.core.errors import RefusalCode, SequenceRefused
from outrider.shared.core.rules import RULES
from outrider.shared.core.types import (
    Decoding,
    OpenSequence,
    PositionLogprobs,
    Proposal,
    ProposeItem,
    Refusal,
    RoundResult,
    SparseRow,
    Verdict,
    VerifyItem,
)

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
ids = st.lists(u32, max_size=6).map(tuple)
real = st.floats(allow_nan=False, allow_infinity=False)
single = st.floats(0, 1, width=32)


@st.composite
def sparse_row(draw: st.DrawFn) -> SparseRow:
    tokens = draw(ids)
    return SparseRow(tokens, tuple(draw(single) for _ in tokens))


rows = st.lists(sparse_row(), max_size=3).map(tuple)
FIELDS = {
    "temperature": real,
    "top_k": u32,
    "top_p": real,
    "min_p": real,
    "repetition_penalty": real,
    "presence_penalty": real,
    "frequency_penalty": real,
    "logit_bias": st.dictionaries(u32, real, max_size=3).map(lambda d: tuple(sorted(d.items()))),
    "bad_words": st.lists(ids, max_size=2).map(tuple),
    "eos_token_ids": ids,
    "min_new_tokens": u32,
    "prompt_len": u32,
    "seed": u64,
    "rule": st.sampled_from(list(RULES.values())),
    "logprobs": st.none() | u32,
    "draft_top": u32,
    "vocab_size": u32,
}
decoding = st.builds(Decoding, **FIELDS)
opened = st.builds(OpenSequence, u64, u32, u32, decoding, st.none() | u64, u32)
propose = st.builds(ProposeItem, u64, u32, u32, ids, u32)
verify = st.builds(VerifyItem, u64, u32, u32, ids, ids, rows, st.booleans())
refusal = st.builds(
    Refusal, u64, u32, st.sampled_from(RefusalCode).map(int), st.text(max_size=9), u32
)
logprobs = st.builds(PositionLogprobs, real, st.lists(st.tuples(u32, real), max_size=3).map(tuple))


def results(answers: st.SearchStrategy[object]) -> st.SearchStrategy[RoundResult[object]]:
    return st.builds(
        RoundResult, st.lists(answers, max_size=3), st.lists(refusal, max_size=2), real, u32
    )


@given(opened)
def test_wire_admission_comes_back_equal(item: OpenSequence) -> None:
    got = pb.OpenSequence.FromString(wire.write_open(item).SerializeToString())
    assert wire.read_open(got) == item


@given(st.lists(propose, max_size=3))
def test_wire_propose_items_are_read(items: list[ProposeItem]) -> None:
    sent = pb.DraftRequest(items=[asdict(item) for item in items])
    got = pb.DraftRequest.FromString(sent.SerializeToString())
    assert wire.read_propose_items(got) == items


@given(st.lists(verify, max_size=3))
def test_wire_verify_items_are_read(items: list[VerifyItem]) -> None:
    sent = pb.VerifyRequest(items=[asdict(item) for item in items])
    got = pb.VerifyRequest.FromString(sent.SerializeToString())
    assert wire.read_verify_items(got) == items


def fields(result: RoundResult[Any]) -> dict[str, Any]:
    """What both kinds of answer say of a round, in the words of the messages."""
    timing = {"model_seconds": result.model_seconds, "service_seconds": 0.25, "rows": result.rows}
    return {"errors": [asdict(one) for one in result.refusals], "timing": timing}


@given(u64, results(st.builds(Proposal, u64, u32, u32, ids, rows)))
def test_wire_draft_responses_say_the_result(number: int, result: RoundResult[Proposal]) -> None:
    sent = wire.write_draft_response(number, result, 0.25)
    proposals = [asdict(one) for one in result.answers]
    assert sent == pb.DraftResponse(round=number, proposals=proposals, **fields(result))


verdict = st.builds(
    Verdict, u64, u32, u32, st.none() | u32, u32, st.lists(logprobs, max_size=2).map(tuple)
)


@given(u64, results(verdict))
def test_wire_verify_responses_say_the_result(number: int, result: RoundResult[Verdict]) -> None:
    sent = wire.write_verify_response(number, result, 0.25)
    verdicts = [asdict(one) for one in result.answers]
    for one in verdicts:
        for row in one["logprobs"]:
            top = row.pop("top")
            row["top_ids"] = [token for token, _ in top]
            row["top_logprobs"] = [value for _, value in top]
    assert sent == pb.VerifyResponse(round=number, verdicts=verdicts, **fields(result))


def test_wire_probabilities_travel_in_single_precision() -> None:
    row = pb.SparseRow(ids=[2], probabilities=[0.1])
    (got,) = wire.read_verify_items(pb.VerifyRequest(items=[pb.VerifyItem(rows=[row])]))
    assert got.rows[0].probabilities == struct.unpack("f", struct.pack("f", 0.1))


def test_wire_every_field_of_a_decoding_is_tried() -> None:
    assert set(FIELDS) == {one.name for one in dataclasses.fields(Decoding)}


@pytest.mark.parametrize("token", [0, None])
def test_wire_zero_and_unset_next_token_differ(token: int | None) -> None:
    sent = wire.write_verify_response(1, RoundResult([Verdict(1, 1, 0, token, 5)]), 0.0)
    got = pb.VerifyResponse.FromString(sent.SerializeToString())
    assert got.verdicts[0].HasField("next_token") == (token is not None)


@pytest.mark.parametrize("rule", [0, 9])
def test_wire_unknown_rule_is_refused_as_invalid(rule: int) -> None:
    message = wire.write_open(OpenSequence(1, 1, 8, Decoding()))
    message.decoding.rule = rule  # type: ignore[assignment]
    with pytest.raises(SequenceRefused, match=r"decoding\.rule") as caught:
        wire.read_open(message)
    assert caught.value.code is RefusalCode.INVALID
