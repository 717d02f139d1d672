"""Verdicts: how many proposed tokens the base chose itself, and its token after them.

Greedy and coupled acceptance are one comparison; the rules differ in how the choices are made
(``choose``). Only integers leave the device.
"""

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
    *,
    chosen: Tensor,
    tokens: Tensor,
    pending: Tensor,
    proposed: Tensor,
    verdicts: Tensor,
    overlap: bool = False,
) -> None:
    """All int32. ``chosen`` [rows]: the base's token after each row; ``tokens`` [rows]: the rows'
    own tokens; ``pending`` [sequences]: row of the pending token; ``proposed`` [sequences]: K;
    ``verdicts`` [sequences, 2]: (accepted, next token)."""
    steps = torch.arange(int(chosen.shape[0]), device=chosen.device)
    at = (pending[:, None] + steps).clamp_(max=chosen.shape[0] - 1).long()
    following = (at + 1).clamp_(max=chosen.shape[0] - 1)
    equal = (chosen[at] == tokens[following]) & (steps < proposed[:, None])
    accepted = equal.int().cumprod(-1).sum(-1)
    verdicts[:, 0] = accepted
    verdicts[:, 1] = chosen[(pending + accepted).long()]


def _cuda(tools: Tools) -> Call:
    def run(
        *,
        chosen: Tensor,
        tokens: Tensor,
        pending: Tensor,
        proposed: Tensor,
        verdicts: Tensor,
        overlap: bool = False,
    ) -> None:
        kernel = tools.compiler.kernel("accept", "accept", {"BF16": 0}, threads=64, shared=0)
        arguments = (chosen, tokens, pending, proposed, verdicts, verdicts.shape[0])
        kernel.launch((1,), arguments, overlap=overlap)

    return run


def _triton(tools: Tools) -> Call:
    from outrider.kernels.accept_triton import launch_accept

    return launch_accept


def _cases(device: torch.device, dtype: torch.dtype) -> Iterator[Arguments]:
    # Tokens 0 … 2 make chance agreement common: every length of the accepted prefix occurs.
    for proposed in ((0,), (4,), (3, 0, 5, 1)):
        rows = sum(proposed) + len(proposed)
        starts = [sum(proposed[:i]) + i for i in range(len(proposed))]
        yield {
            "chosen": torch.randint(0, 3, (rows,), device=device, dtype=torch.int32),
            "tokens": torch.randint(0, 3, (rows,), device=device, dtype=torch.int32),
            "pending": torch.tensor(starts, device=device, dtype=torch.int32),
            "proposed": torch.tensor(proposed, device=device, dtype=torch.int32),
            "verdicts": torch.empty(len(proposed), 2, device=device, dtype=torch.int32),
        }


OPERATION = Operation(
    "accept",
    "greedy and coupled acceptance",
    reference,
    ("verdicts",),
    _cases,
    {},
    (
        Implementation("cuda", no_cuda_source, _cuda),
        Implementation("triton", no_triton, _triton),
        Implementation("torch", always, lambda tools: reference, "ten launches instead of one"),
    ),
)
