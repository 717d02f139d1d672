"""Runs the Triton implementations of operations on the CPU; its own process, because Triton
decides when a kernel is defined whether it is interpreted."""

from __future__ import annotations

import copy
import sys

import torch

from outrider.kernels import registry
from outrider.kernels.operation import Tools


def check(name: str, dtype: torch.dtype) -> None:
    operation = registry.operations()[name]
    device = torch.device("cpu")
    implementation, _ = registry.resolve(name, device, dtype, implementation="triton")
    run = implementation.build(Tools(device))
    torch.manual_seed(3)
    for number, case in enumerate(operation.cases(device, dtype)):
        expected, got = copy.deepcopy(case), copy.deepcopy(case)
        operation.reference(**expected)
        run(**got)
        for output in operation.outputs:
            want, have = expected[output], got[output]
            if not want.is_floating_point():
                assert torch.equal(want, have), (name, dtype, number, want, have)
                continue
            # Rows that are not asked for hold whatever was there.
            if "rows" in case and output == "out" and name != "attention":
                want, have = want[: case["rows"]], have[: case["rows"]]
            error = float((have.double() - want.double()).norm() / want.double().norm())
            assert error <= operation.tolerance[dtype], (name, dtype, number, output, error)


if __name__ == "__main__":
    for dtype in sys.argv[1].split(","):
        for name in sys.argv[2:]:
            check(name, getattr(torch, dtype))
