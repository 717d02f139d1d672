"""The registry's choices and refusals."""

from __future__ import annotations

import pytest
import torch

from outrider.kernels import registry
from outrider.kernels.registry import NotAvailable

CPU = torch.device("cpu")


def test_every_operation_is_declared_once_and_ends_in_a_fallback_that_runs_anywhere():
    known = registry.operations()
    forward = {"embed", "norm", "linear", "attention", "choose", "accept", "reject"}
    assert set(known) == forward | {"take", "settle", "follow"}
    for name, operation in known.items():
        assert operation.name == name
        assert operation.implementations[-1].why_not(CPU, torch.float32) is None
        names = [i.name for i in operation.implementations]
        assert len(set(names)) == len(names) and names[0] == "cuda"


def test_choice_on_a_cpu_says_why_the_better_ones_are_not_taken():
    for choice in registry.choices(CPU, torch.float32):
        assert choice.implementation == "torch"
        assert "not cuda: the device is cpu" in str(choice)
        assert "cost: " in str(choice)


def test_asking_for_what_is_not_there_lists_what_is():
    with pytest.raises(NotAvailable, match="there are torch"):
        registry.resolve("linear", CPU, torch.float32, implementation="cuda")
    with pytest.raises(NotAvailable, match="there are embed, norm, linear"):
        registry.resolve("softmax", CPU, torch.float32)


def test_asked_for_implementation_is_taken():
    implementation, choice = registry.resolve("norm", CPU, torch.float32, implementation="torch")
    assert implementation.name == choice.implementation == "torch"
    assert choice.skipped == ()


def test_noise_of_the_reference_is_the_shared_noise():
    from outrider.kernels.choose import reference
    from outrider.shared.sampling.noise import gumbel

    logits = torch.randn(3, 1001)
    seeds = torch.tensor([5, -7, 1 << 40])
    positions = torch.tensor([0, 99, 70000], dtype=torch.int32)
    tokens = torch.zeros(3, dtype=torch.int32)
    reference(
        logits=logits, rows=None, temperatures=torch.tensor([1.0, 0.5, 2.0]), seeds=seeds,
        positions=positions, offset=2, tokens=tokens, count=3,
    )  # fmt: skip
    heat = torch.tensor([[1.0], [0.5], [2.0]])
    expected = (logits / heat + gumbel(seeds, positions.long() + 2, 1001)).argmax(-1)
    assert torch.equal(tokens.long(), expected)
