"""What the device chooses by itself, and what the CUDA path declines; no GPU needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from outrider.kernels.registry import Choice, operations
from outrider.shared.core.rules import COUPLED, REJECTION
from outrider.shared.core.types import Decoding
from outrider.shared.model.cuda import support
from outrider.shared.model.cuda.inputs import Field, Inputs
from outrider.shared.model.cuda.support import judged, simple, why_not


@pytest.mark.parametrize(
    ("decoding", "expected"),
    [
        (Decoding(), True),
        (Decoding(temperature=0.7, rule=COUPLED), True),
        (Decoding(temperature=0.7, rule=REJECTION), False),
        (Decoding(rule=REJECTION), True),
        (Decoding(temperature=1e-5, rule=COUPLED), False),
        (Decoding(temperature=0.7, top_k=5, rule=COUPLED), False),
        (Decoding(top_k=5), True),
        (Decoding(repetition_penalty=1.1), False),
        (Decoding(logit_bias=((3, 1.0),)), False),
        (Decoding(logprobs=0), False),
    ],
)
def test_simple_is_argmax_or_temperature_and_noise_alone(decoding, expected):
    assert simple(decoding) is expected
    # Judged by the device as well: rejection at a temperature alone.
    rejection = decoding.rule == REJECTION and decoding.temperature > 0
    assert judged(decoding) is (expected or rejection)


@pytest.mark.parametrize(
    "changes", [{"top_p": 0.9}, {"logprobs": 1}, {"temperature": 1e-4}], ids=str
)
def test_rejection_with_more_than_a_temperature_is_judged_by_the_host(changes):
    assert not judged(Decoding(**({"temperature": 0.7, "rule": REJECTION} | changes)))


def test_declines_what_its_kernels_do_not_know():
    config = SimpleNamespace(
        head_dim=80, hidden_size=256, intermediate_size=512, num_attention_heads=4
    )
    head = SimpleNamespace(weight=torch.zeros(512, 256))
    model = SimpleNamespace(config=config, lm_head=head)
    assert "the device is cpu" in why_not(model, torch.device("cpu"), torch.float32)
    assert "heads of 80 elements" in why_not(model, torch.device("cuda"), torch.float16)
    config.head_dim, config.intermediate_size = 64, 500
    assert "multiple of 64" in why_not(model, torch.device("cuda"), torch.float16)


def test_inputs_have_equal_host_and_device_sides():
    fields = [Field("a", (3,)), Field("seeds", (2,), "l"), Field("heat", (2, 2), "f")]
    inputs = Inputs(fields, torch.device("cpu"))
    inputs.host["a"][:] = [1, -2, 3]
    inputs.host["seeds"][:] = [-(1 << 63), 7]
    inputs.host["heat"][1] = 0.5
    assert inputs.device["a"].tolist() == [0, 0, 0]
    inputs.upload()
    assert inputs.device["a"].tolist() == [1, -2, 3]
    assert inputs.device["seeds"].tolist() == [-(1 << 63), 7]
    assert inputs.device["heat"].tolist() == [[0, 0], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("in_torch", "expected"),
    [
        (("embed", "reject", "take", "settle", "follow"), None),
        (("embed", "norm"), "no kernels for norm"),
    ],
)
def test_declines_fallbacks_that_every_forward_would_pay_for(monkeypatch, in_torch, expected):
    config = SimpleNamespace(head_dim=64, hidden_size=256, intermediate_size=512)
    model = SimpleNamespace(config=config, lm_head=SimpleNamespace(weight=torch.zeros(512, 256)))
    choices = [
        Choice(name, "torch" if name in in_torch else "cuda", (), "") for name in operations()
    ]
    monkeypatch.setattr(support, "resolve_all", lambda *_: ({}, choices))
    assert why_not(model, torch.device("cuda"), torch.float16) == expected
