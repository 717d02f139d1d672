"""The weights of a Llama-like model in the layout of the CPU kernels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from outrider.kernels.cpu.shape import padded

_SHORT = (torch.bfloat16, torch.float16)


def narrowest(tensors: Iterable[Tensor], dtype: torch.dtype) -> torch.dtype:
    """The smallest type that holds every one of the weights as it is.

    Most checkpoints are published in 16 bits: read as float32, half of every number is zeros. The
    products are float32 whatever the weights are kept in, so this changes no result.
    """
    if dtype != torch.float32:
        return dtype
    left = list(_SHORT)
    for tensor in tensors:
        left = [kind for kind in left if torch.equal(tensor.to(kind).float(), tensor)]
        if not left:
            return dtype
    return left[0] if left else dtype


def panels(weight: Tensor, columns: int, kind: torch.dtype) -> Tensor:
    """``[out, in]`` to panels ``[panel, in, column]``; columns that fill the last are zero."""
    count, depth = weight.shape
    whole = weight.new_zeros(padded(count, columns), depth, dtype=kind)
    whole[:count] = weight
    return _turned(whole, columns)


def gated_panels(gate: Tensor, up: Tensor, columns: int, kind: torch.dtype) -> Tensor:
    """Panels whose first half is from ``gate`` and the second from ``up``, ``[out, in]`` each."""
    half = columns // 2
    count, depth = gate.shape
    whole = gate.new_zeros(padded(count, half), 2, depth, dtype=kind)
    whole[:count, 0] = gate
    whole[:count, 1] = up
    parts = whole.view(-1, half, 2, depth).transpose(1, 2).reshape(-1, depth)
    return _turned(parts, columns)


def filled(values: Tensor, width: int) -> Tensor:
    """A vector as float32, with zeros behind it up to ``width``."""
    out = torch.zeros(width)
    out[: values.shape[0]] = values
    return out


def _turned(whole: Tensor, columns: int) -> Tensor:
    """Rows, a whole number of panels, to ``[panel, in, column]``."""
    depth = whole.shape[1]
    turned = whole.view(-1, columns, depth).transpose(1, 2)
    if whole.dtype == torch.bfloat16:
        # Columns j and j + columns/2 share a word: see ``kernels/cpu/linear.py``.
        turned = turned.unflatten(2, (2, columns // 2)).transpose(2, 3)
    return turned.contiguous()
