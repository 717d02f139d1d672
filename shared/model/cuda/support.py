"""What the CUDA path can run: models and devices, and ways of choosing tokens."""

from __future__ import annotations

from typing import Any

import torch

from outrider.kernels import linear
from outrider.kernels.attention_shapes import HEAD_DIMS
from outrider.kernels.operation import Tools
from outrider.kernels.registry import NotAvailable
from outrider.shared.core.rules import GREEDY, REJECTION
from outrider.shared.core.types import Decoding
from outrider.shared.model.cuda.forward import resolve_all
from outrider.shared.model.llama.shapes import head_dim
from outrider.shared.sampling.choose import reshapes

# Operations whose fallback in PyTorch does: one launch a step, only for turns on the device, or
# what the plain path would do as well.
_FALLBACK_DOES = frozenset({"embed", "reject", "take", "settle", "follow"})
# Judges (of ``verify_service/rules``) that have a kernel: ``accept`` and ``reject``.
_JUDGES = frozenset({GREEDY.judge, REJECTION.judge})
# Below this temperature the plain path shifts the logits before it divides.
_TINY_TEMPERATURE = 1e-3


def why_not(model: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this path can't run a model of the Llama family there; None where it can."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    config = model.config
    dim = head_dim(config)
    if dim not in HEAD_DIMS:
        return f"heads of {dim} elements; the kernels know {', '.join(map(str, HEAD_DIMS))}"
    if config.intermediate_size % 64 or config.hidden_size % 64:
        return "a layer's width is not a multiple of 64"
    reason = linear.why_not_shape(model.lm_head.weight)
    if reason is not None:
        return reason
    try:
        _, choices = resolve_all(Tools(device), dtype)
    except NotAvailable as error:
        return str(error)
    torch_only = {c.operation for c in choices if c.implementation == "torch"}
    slow = sorted(torch_only - _FALLBACK_DOES)
    return f"no kernels for {', '.join(slow)}" if slow else None


def simple(d: Decoding) -> bool:
    """Whether the device chooses by itself, and judges by comparing: argmax, or temperature and
    noise alone."""
    return judged(d) and d.rule.judge == GREEDY.judge and not d.rule.needs_rows


def judged(d: Decoding) -> bool:
    """Whether the device judges proposals by itself: ``simple``, or rejection at a temperature
    alone. It proposes nothing for the latter."""
    if d.logprobs is not None or reshapes(d) or d.rule.judge not in _JUDGES:
        return False
    return d.temperature == 0 or d.temperature >= _TINY_TEMPERATURE
