"""Muon for the matrices inside the layers, AdamW for the rest; a schedule that follows the clock.

Source: Jordan et al. 2024 (Muon); Loshchilov and Hutter 2019 (AdamW); Hu et al. 2024
(warmup, stable, decay).
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz: each matrix of g [n, rows, cols] to nearly its nearest orthogonal one."""
    x = g.bfloat16() if g.is_cuda else g.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return (x.mT if tall else x).float()


class Optimiser:
    """Both optimisers under one `step(scale)`; `scale` multiplies both peak learning rates."""

    def __init__(
        self, model: nn.Module, muon_lr: float, adam_lr: float, decay: float = 0.1
    ) -> None:
        inner = [p for n, p in model.named_parameters() if p.dim() == 2 and "layers." in n]
        outer = [p for n, p in model.named_parameters() if not (p.dim() == 2 and "layers." in n)]
        groups: dict[torch.Size, list[nn.Parameter]] = {}
        for p in inner:
            groups.setdefault(p.shape, []).append(p)
        self.groups = list(groups.values())
        self.momentum = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]
        self.muon_lr, self.adam_lr, self.decay = muon_lr, adam_lr, decay
        self.adam = torch.optim.AdamW(
            outer,
            lr=adam_lr,
            betas=(0.9, 0.95),
            eps=1e-10,
            weight_decay=0.0,
            fused=outer[0].is_cuda,
        )
        self.parameters = inner + outer

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update from the gradients, which it then clears."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group, momentum in zip(self.groups, self.momentum, strict=True):
            grad = torch.stack([p.grad for p in group])
            momentum.lerp_(grad, 0.05)
            update = orthogonalise(grad.lerp_(momentum, 0.95))
            rate = self.muon_lr * scale * max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
            torch._foreach_mul_(group, 1.0 - self.muon_lr * scale * self.decay)
            torch._foreach_add_(group, list(update.unbind(0)), alpha=-rate)
        for settings in self.adam.param_groups:
            settings["lr"] = self.adam_lr * scale
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        for group in self.groups:
            for p in group:
                p.grad = None

    def reset(self) -> None:
        """Forgets the momentum, after the weights were put back."""
        for momentum in self.momentum:
            momentum.zero_()
        self.adam.state.clear()


class Clock:
    """A stage's time: `progress()` runs from 0 to 1 over `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.monotonic(), max(1e-3, seconds)

    def progress(self) -> float:
        return (time.monotonic() - self.start) / self.seconds

    def elapsed(self) -> float:
        return time.monotonic() - self.start


def rate(step: int, progress: float, warmup: int = 100, decay_from: float = 0.4) -> float:
    """Share of the peak rate: linear warmup by steps, flat, then linear to 0 by the clock."""
    fade = 1.0 if progress < decay_from else max(0.0, (1.0 - progress) / (1.0 - decay_from))
    return min(1.0, (step + 1) / warmup) * fade
