"""Matrix products of a few rows, and RMS norms, in the form that is fastest where they run.

Measured on a 2-core x86-64 machine with MKL, float32, all weights of a 12 M parameter model,
milliseconds per step (one thread, lowest of 40 runs; two threads in brackets):

======================================  ==========  ==========  ==========  ==========
form                                    1 row       2 rows      5 rows      9 rows
======================================  ==========  ==========  ==========  ==========
``linear(x, W)``                        5.2 (5.6)   7.9 (12)    8.9 (7.1)   12 (11)
``mm(W, x.T).T``                                    2.7 (1.8)   5.1 (2.9)   12 (4.6)
``mm(x, V)`` with V = W.T stored        3.3 (3.3)   4.5 (4.9)   7.3 (5.1)   11 (6.1)
oneDNN ``_linear_pointwise(x, W)``      4.8 (4.1)   6.3 (4.7)   7.7 (4.6)   11 (5.3)
======================================  ==========  ==========  ==========  ==========

So up to eight rows are asked for as ``W @ x.T``, and a lone row is given a twin: two columns
are cheaper than one, because one column takes the library's matrix-vector kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

FEW_ROWS = 8


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``rows @ weight.T + bias``: [rows, in] x [out, in] -> [rows, out], maybe not contiguous."""
    if 1 < rows.shape[0] <= FEW_ROWS and rows.dtype == torch.float32 and rows.is_cpu:
        out = torch.mm(weight, rows.t()).t()
        return out if bias is None else out.add_(bias)
    return functional.linear(rows, weight, bias)


def fuse(layers: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    """Stacks the weights (and biases) of linear modules into one tensor.

    The modules' parameters become slices of it: nothing is held twice.
    """
    weight = torch.cat([layer.weight.data for layer in layers])
    bias = None
    if layers[0].bias is not None:
        bias = torch.cat([layer.bias.data for layer in layers])
    begin = 0
    for layer in layers:
        end = begin + layer.weight.shape[0]
        layer.weight.data = weight[begin:end]
        if bias is not None:
            layer.bias.data = bias[begin:end]
        begin = end
    return weight, bias


class RmsNorm:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension.

    On a CPU ``rms_norm`` is a chain of unfused operations. This one needs four small ones: with
    ``n = |x|`` and ``d`` elements, ``sqrt(n^2/d + eps) = hypot(n, sqrt(eps d)) / sqrt(d)``.
    """

    def __init__(self, module: Any, eps: float) -> None:
        """``module`` holds ``weight`` [dim]."""
        self._weight: Tensor = module.weight.data
        self._eps = eps
        self._small = self._weight.is_cpu and self._weight.dtype == torch.float32
        size = self._weight.shape[0]
        if self._small:
            self._scaled = self._weight * size**0.5
            self._root = torch.tensor([(eps * size) ** 0.5])

    def __call__(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim], contiguous."""
        if not self._small:
            return functional.rms_norm(x, self._weight.shape, self._weight, self._eps)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x.div(length.hypot_(self._root)).mul_(self._scaled)
