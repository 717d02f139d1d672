"""Rotary embeddings of two kinds, for short and for long sequences (``longrope``).

transformers takes one kind for all rows of a forward, by its largest position. Here each row has
the one that it would have if its sequence were decoded alone, a token at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from outrider.shared.core.errors import ConfigError
from outrider.shared.model.runner import RotarySwitch, Span

# Models whose ``generate`` forgets its cache where the sequence becomes long, and takes it all in
# anew; others keep the keys that they cached.
_TAKE_IN_ANEW = frozenset({"phi3", "phimoe", "phi4_multimodal"})


class LengthRotary:
    """Stands before the rotary modules of one model."""

    def __init__(self, model: Any) -> None:
        """Raises ``ConfigError`` where layers of several types have such embeddings."""
        self._long: Tensor | None = None
        self.switch: RotarySwitch | None = None
        for module in model.modules():
            kind = getattr(module, "rope_type", None)
            if isinstance(kind, dict) and "longrope" in kind.values():
                raise ConfigError(
                    f"rope_parameters: got {kind}; longrope must be that of all layers or of none"
                )
            if kind == "longrope":
                border = int(module.config.rope_parameters["original_max_position_embeddings"])
                anew = getattr(model.config, "model_type", "") in _TAKE_IN_ANEW
                self.switch = RotarySwitch(border, anew)
                self._take_over(module, border)

    @contextlib.contextmanager
    def turning(self, spans: Sequence[Span], device: torch.device) -> Iterator[None]:
        """Within, the rows of a forward are those of ``spans``; else its module is left alone."""
        if self.switch is not None:
            # Whatever is said of its sequence, no row beyond the border is short.
            flags = [
                position >= min(span.long_from, self.switch.border)
                for span in spans
                for position in range(span.start, span.end)
            ]
            self._long = torch.tensor(flags, device=device)[None, :, None]
        try:
            yield
        finally:
            self._long = None

    def _take_over(self, module: Any, border: int) -> None:
        theirs = module.forward

        # The module itself is asked for both, with positions that make it choose: besides its
        # factors, some (Phi-3.5-MoE) scale what they give by the largest position.
        def forward(x: Tensor, position_ids: Tensor, **options: Any) -> Any:
            flags = self._long
            if flags is None:
                return theirs(x, position_ids, **options)
            near = theirs(x, position_ids.clamp(max=border - 1), **options)
            beyond = torch.full_like(position_ids[..., :1], border)
            far = theirs(x, torch.cat((position_ids, beyond), -1), **options)
            return tuple(torch.where(flags, b[:, :-1], a) for a, b in zip(near, far, strict=True))

        module.forward = forward
