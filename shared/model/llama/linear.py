"""Matrix products of a few rows, and RMS norms, in the form that is fastest where they run.

Measured on a 2-core x86-64 machine with MKL, float32, one thread, all weights of a model once, in
milliseconds of processor time:

==============================  ======  ======  ======  ======  ======  ======  ======
12 M parameters (from memory)   1 row   2       3       4       5       8       12
==============================  ======  ======  ======  ======  ======  ======  ======
``linear(x, W)``                5.4     8.6     10.9    8.4     9.2     9.3     10.0
``mm(W, x.T).T``                (2.7)   2.8     3.9     4.0     5.2     7.0     14
oneDNN ``_linear_pointwise``    4.8     6.3     6.7     7.1     7.7     8.4
==============================  ======  ======  ======  ======  ======  ======  ======

==============================  ======  ======  ======  ======  ======  ======
2 M parameters (from cache)     1 row   2       3       4       5       8
==============================  ======  ======  ======  ======  ======  ======
``linear(x, W)``                0.23    0.45    0.66    0.48    0.59    0.91
``mm(W, x.T).T``                (0.39)  0.38    0.60    0.56    0.78    1.0
==============================  ======  ======  ======  ======  ======  ======

In brackets: a lone row with a twin, because one column would take the library's matrix-vector
kernel, which reads memory at half the speed. ``W @ x.T`` is asked for up to ten rows, for small
models too: what one gains while its weights are in the cache, it loses by more whenever another
process has pushed them out, and the base does so in every round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Products:
    """How matrix products are done for one model. ``twin``: give a lone row a copy of itself;
    ``turned``: row counts for which ``W @ x.T`` is used."""

    twin: bool
    turned: range

    @classmethod
    def choose(cls, dtype: torch.dtype, device: torch.device) -> Products:
        """A fixed rule rather than a trial, so that the same model gives the same bits."""
        turned = device.type == "cpu" and dtype == torch.float32
        return cls(turned, range(2, 11) if turned else range(0))

    def __call__(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``rows @ weight.T + bias``: [rows, in] x [out, in] -> [rows, out], in any layout."""
        if rows.shape[0] in self.turned:
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
