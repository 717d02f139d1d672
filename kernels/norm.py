"""RMS norm of rows: ``out = weight * x / sqrt(mean(x²) + eps)``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from outrider.kernels.operation import (
    Arguments,
    Call,
    Implementation,
    Operation,
    Tools,
    always,
    no_cuda_source,
    no_triton,
)


def reference(
    *, x: Tensor, weight: Tensor, out: Tensor, rows: int, eps: float, overlap: bool = False
) -> None:
    """``x``, ``out``: [at least rows, width]; ``weight`` [width]. Rounds as transformers does."""
    wide = x[:rows].float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    out[:rows] = weight * scaled.to(x.dtype)


def _cuda(tools: Tools) -> Call:
    def run(
        *, x: Tensor, weight: Tensor, out: Tensor, rows: int, eps: float, overlap: bool = False
    ) -> None:
        defines = {"BF16": int(x.dtype == torch.bfloat16)}
        kernel = tools.compiler.kernel("norm", "rms_norm", defines, threads=32, shared=0)
        kernel.launch((rows,), (x, weight, out, x.shape[1], eps), overlap=overlap)

    return run


def _triton(tools: Tools) -> Call:
    from outrider.kernels.norm_triton import launch_norm

    return launch_norm


def _cases(device: torch.device, dtype: torch.dtype) -> Iterator[Arguments]:
    for rows, width in ((1, 512), (5, 3072), (64, 768)):
        yield {
            "x": torch.randn(64, width, device=device).to(dtype),
            "weight": (1 + 0.1 * torch.randn(width, device=device)).to(dtype),
            "out": torch.empty(64, width, device=device, dtype=dtype),
            "rows": rows,
            "eps": 1e-5,
        }


OPERATION = Operation(
    "norm",
    "RMS norm of rows",
    reference,
    ("out",),
    _cases,
    {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3},
    (
        Implementation("cuda", no_cuda_source, _cuda),
        Implementation("triton", no_triton, _triton),
        Implementation("torch", always, lambda tools: reference, "six launches instead of one"),
    ),
)
