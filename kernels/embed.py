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
    """``tokens``: int32 [at least rows]; ``table`` [vocabulary, width]; ``out`` [.., width].

    A token that the table has not is taken for the nearest one that it has.
    """
    known = tokens[:rows].clamp(0, table.shape[0] - 1)
    torch.index_select(table, 0, known, out=out[:rows])


def _cuda(tools: Tools) -> Call:
    def run(
        *, tokens: Tensor, table: Tensor, out: Tensor, rows: int, overlap: bool = False
    ) -> None:
        defines = {"BF16": int(table.dtype == torch.bfloat16)}
        kernel = tools.compiler.kernel("embed", "embed", defines, threads=128, shared=0)
        kernel.launch((rows,), (tokens, table, out, *reversed(table.shape)), overlap=overlap)

    return run


def _cases(device: torch.device, dtype: torch.dtype) -> Iterator[Arguments]:
    for rows in (1, 7):
        tokens = torch.randint(0, 100, (64,), device=device, dtype=torch.int32)
        tokens[2:6] = torch.tensor([-1, 100, 150, (1 << 31) - 1], device=device)
        yield {
            "tokens": tokens,
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
