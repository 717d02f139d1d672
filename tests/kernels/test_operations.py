"""Every implementation of every operation against its reference."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from outrider.kernels import registry
from outrider.kernels.operation import Operation, Tools

OPERATIONS = registry.operations()
WITH_TRITON = [
    name
    for name, operation in OPERATIONS.items()
    if any(i.name == "triton" for i in operation.implementations)
]
FLOATS = [torch.float16, torch.bfloat16]


def check(operation: Operation, run, device: torch.device, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    for number, case in enumerate(operation.cases(device, dtype)):
        expected, got = copy.deepcopy(case), copy.deepcopy(case)
        for name in operation.outputs:
            if got[name].is_floating_point() and name == "out":
                got[name].fill_(float("nan"))
                expected[name].fill_(float("nan"))
        operation.reference(**expected)
        run(**got)
        for name in operation.outputs:
            want, have = expected[name], got[name]
            if not want.is_floating_point():
                assert torch.equal(want, have), (number, name, want, have)
                continue
            assert torch.equal(want.isnan(), have.isnan()), (number, name)
            want, have = want.nan_to_num().double(), have.nan_to_num().double()
            error = float((have - want).norm() / want.norm())
            assert error <= operation.tolerance[dtype], (number, name, error)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(
    ("arch", "dtype"), [(75, torch.float16), (90, torch.bfloat16)], ids=["sm_75", "sm_90"]
)
def test_cuda_source_matches_reference_on_the_host(emulated, name, arch, dtype):
    operation = OPERATIONS[name]
    implementation = next(i for i in operation.implementations if i.name == "cuda")
    for late in (0, 1):
        compiler = emulated(arch)
        compiler.late = late
        tools = Tools(torch.device("cpu"), compiler)
        check(operation, implementation.build(tools), tools.device, dtype)


def test_triton_matches_reference_in_the_interpreter():
    pytest.importorskip("triton")
    # bfloat16 is left out: the interpreter cuts where the hardware rounds.
    dtypes = "float16,float32"
    found = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "interpret.py"), dtypes, *WITH_TRITON],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("kind", ["cuda", "triton", "torch"])
def test_implementation_matches_reference_on_the_gpu(name, kind, dtype):
    device, operation = torch.device("cuda"), OPERATIONS[name]
    found = [i for i in operation.implementations if i.name == kind]
    if not found or found[0].why_not(device, dtype):
        pytest.skip("not there on this device")
    check(operation, found[0].build(Tools(device)), device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATIONS)
def test_code_for_older_chips_matches_reference_on_the_gpu(name):
    from outrider.kernels.cuda import Compiler

    device, operation = torch.device("cuda"), OPERATIONS[name]
    tools = Tools(device, Compiler(device, arch=75))
    implementation = next(i for i in operation.implementations if i.name == "cuda")
    check(operation, implementation.build(tools), device, torch.float16)
