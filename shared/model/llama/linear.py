"""Weights of several layers in one, and RMS norms, in the form that is fastest where they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


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
