"""Sampling parameters: each is declared once, and has its place everywhere else."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from google.protobuf.descriptor import FieldDescriptor

from outrider.coordinator.cli.main import make_parser
from outrider.protos import generation_pb2 as public
from outrider.protos import speculation_pb2 as internal
from outrider.shared.core.errors import InvalidRequest
from outrider.shared.core.parameters import INT32, Number, TokenBiases, TokenLists, Whole
from outrider.shared.core.types import PARAMETERS, Decoding

PAGE = Path(__file__).parents[3] / "docs" / "decoding.md"
OF_THE_SERVER = {"eos_token_ids", "prompt_len", "rule", "logprobs", "draft_top", "vocab_size"}
"""Fields of ``Decoding`` that come from elsewhere than ``SamplingParameters``."""
TYPES: dict[Any, Any] = {
    Number: float,
    Whole: int,
    TokenBiases: tuple[tuple[int, float], ...],
    TokenLists: tuple[tuple[int, ...], ...],
}


def test_parameters_are_the_fields_that_a_client_can_set() -> None:
    fields = {one.name for one in dataclasses.fields(Decoding)}
    assert set(PARAMETERS) == fields - OF_THE_SERVER
    assert set(PARAMETERS) == set(public.SamplingParameters.DESCRIPTOR.fields_by_name)
    assert fields == set(internal.Decoding.DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_is_of_one_kind_everywhere(name: str) -> None:
    kind = PARAMETERS[name].kind
    assert get_type_hints(Decoding)[name] == TYPES[type(kind)]
    sent = public.SamplingParameters.DESCRIPTOR.fields_by_name[name]
    own = internal.Decoding.DESCRIPTOR.fields_by_name[name]
    numbers = {FieldDescriptor.CPPTYPE_DOUBLE}
    if isinstance(kind, Whole):
        numbers = {FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT32}
        if kind.high > INT32:
            numbers = {FieldDescriptor.CPPTYPE_UINT64}
    if isinstance(kind, Number | Whole):
        # Unset differs from zero: the default is the server's.
        assert sent.has_presence
        assert {sent.cpp_type, own.cpp_type} <= numbers
    else:
        assert sent.is_repeated and own.is_repeated


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_has_a_flag_and_a_row_in_the_docs(name: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    parser = make_parser(["generate"])
    value = {TokenBiases: "5=0.5", TokenLists: "5"}.get(type(PARAMETERS[name].kind), "1")
    if isinstance(kind := PARAMETERS[name].kind, Number) and kind.high_open:
        value = f"{kind.low}"
    assert getattr(parser.parse_args(["generate", "x", f"{flag}={value}"]), name) is not None
    assert getattr(parser.parse_args(["generate", "x"]), name) is None
    assert PARAMETERS[name].help
    row = re.search(rf"^\| `{name}` \| `{flag}\b.*$", PAGE.read_text(), re.MULTILINE)
    assert row, f"docs/decoding.md has no row for {name} with {flag}"


def test_defaults_may_be_sent() -> None:
    """What a parameter is where it is not sent would pass the check, too."""
    for one in dataclasses.fields(Decoding):
        kind = getattr(PARAMETERS.get(one.name), "kind", None)
        if isinstance(kind, Number | Whole):
            assert kind.checked(one.name, one.default, 100) == one.default
        elif kind is not None:
            assert one.default == ()


@pytest.mark.parametrize(
    ("kind", "good", "bad", "allowed"),
    [
        (Number(0, 1), (0.0, 1.0), (-0.1, 1.1, float("nan")), "in [0, 1]"),
        (Number(0, 1, low_open=True), (0.1, 1.0), (0.0,), "in (0, 1]"),
        (Number(0, 1, high_open=True), (0.0, 0.9), (1.0,), "in [0, 1)"),
        (Number(0), (0.0, 1e300), (-1.0, float("inf")), "a finite number >= 0"),
        (Number(0, low_open=True), (1e-300,), (0.0,), "a finite number > 0"),
        (Number(0, 9, least=1e-6), (0.0, 1e-6, 9.0), (9e-7, -1.0, 9.1), "0 or in [1e-06, 9]"),
        (Whole(), (0, INT32), (-1,), "a whole number >= 0"),
        (Whole(1, 9), (1, 9), (0, 10), "a whole number in [1, 9]"),
    ],
    ids=str,
)
def test_kinds_take_what_they_say(kind: Any, good: Any, bad: Any, allowed: str) -> None:
    for value in good:
        assert kind.checked("sampling.it", value, 100) == value
    for value in bad:
        with pytest.raises(InvalidRequest) as error:
            kind.checked("sampling.it", value, 100)
        assert (error.value.field, error.value.allowed) == ("sampling.it", allowed)
