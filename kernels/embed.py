"""The rows a step begins with: ``out[row] = table[tokens[row]]``."""

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
)


def reference(
    *, tokens: Tensor, table: Tensor, out: Tensor, rows: int, overlap: bool = False
) -> None:
    """``tokens``: int32 [at least rows]; ``table`` [vocabulary, width]; ``out`` [.., width]."""
    torch.index_select(table, 0, tokens[:rows].clamp(min=0), out=out[:rows])


def _cuda(tools: Tools) -> Call:
    def run(
        *, tokens: Tensor, table: Tensor, out: Tensor, rows: int, overlap: bool = False
    ) -> None:
        defines = {"BF16": int(table.dtype == torch.bfloat16)}
        kernel = tools.compiler.kernel("embed", "embed", defines, threads=128, shared=0)
        kernel.launch((rows,), (tokens, table, out, table.shape[1]), overlap=overlap)

    return run


def _cases(device: torch.device, dtype: torch.dtype) -> Iterator[Arguments]:
    for rows in (1, 7):
        yield {
            "tokens": torch.randint(0, 100, (64,), device=device, dtype=torch.int32),
            "table": torch.randn(100, 512, device=device).to(dtype),
            "out": torch.empty(64, 512, device=device, dtype=dtype),
            "rows": rows,
        }


OPERATION = Operation(
    "embed",
    "rows of the embedding table",
    reference,
    ("out",),
    _cases,
    dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), 0.0),
    (
        Implementation("cuda", no_cuda_source, _cuda),
        Implementation("torch", always, lambda tools: reference, "no overlap with its neighbours"),
    ),
)
