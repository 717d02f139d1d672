"""Rotary embeddings with two sets of factors, for short and for long sequences (``longrope``).

transformers takes one set for all rows of a forward, by its largest position. Here each row has
the set that it would have if its sequence were decoded alone, a token at a time.
"""

from __future__ import annotations

import contextlib
import inspect
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
                raise ConfigError("its layers have rotary embeddings of several lengths (longrope)")
            if kind == "longrope":
                border = int(module.config.rope_parameters["original_max_position_embeddings"])
                anew = getattr(model.config, "model_type", "") in _TAKE_IN_ANEW
                self.switch = RotarySwitch(border, anew)
                self._take_over(module, border)

    @contextlib.contextmanager
    def turning(self, spans: Sequence[Span], device: torch.device) -> Iterator[None]:
        """Within, the rows of a forward are those of ``spans``; else its module is left alone."""
        if self.switch is not None:
            flags = [
                position >= span.long_from
                for span in spans
                for position in range(span.start, span.start + len(span.tokens))
            ]
            self._long = torch.tensor(flags, device=device)[None, :, None]
        try:
            yield
        finally:
            self._long = None

    def _take_over(self, module: Any, border: int) -> None:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        theirs = module.forward
        plain = inspect.unwrap(type(module).forward)  # without the choice of factors
        short = module.original_inv_freq.clone()
        long, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, short.device, seq_len=border + 1)

        def turned(factors: Tensor, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
            module.inv_freq.copy_(factors)
            found: tuple[Tensor, Tensor] = plain(module, x, position_ids)
            return found

        @torch.no_grad()
        def forward(x: Tensor, position_ids: Tensor, **options: Any) -> Any:
            flags = self._long
            if flags is None:
                return theirs(x, position_ids, **options)
            near, far = turned(short, x, position_ids), turned(long, x, position_ids)
            return tuple(torch.where(flags, b, a) for a, b in zip(near, far, strict=True))

        module.forward = forward
