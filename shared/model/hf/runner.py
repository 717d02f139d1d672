"""The generic path: any decoder-only model of transformers, forwarded by its own code.

Two modes. *Packed*: the rows of all sequences in one forward, for models whose attention goes
through transformers' attention registry and that take explicit positions. *One by one*: a
forward per sequence, for the others; still over the arena and without copies. Which one a model
can do is found out by trying it against the model's own plain forward, not from a list of names.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from outrider.shared.core.errors import ConfigError
from outrider.shared.core.model_facts import ModelFacts
from outrider.shared.kv.arena import Extent
from outrider.shared.kv.storage import Storage
from outrider.shared.model.hf.cache import ArenaCache
from outrider.shared.model.hf.length_rotary import LengthRotary
from outrider.shared.model.hf.packed_cache import PackedCache, register
from outrider.shared.model.packing import pack
from outrider.shared.model.runner import Runner, Span

log = logging.getLogger(__name__)


class HfRunner(Runner):
    """Forwards a transformers model over the arena."""

    def __init__(
        self, model: Any, facts: ModelFacts, storage: Storage, index: Mapping[int, int]
    ) -> None:
        """``index``: see ``layer_kinds.layer_kinds``. Raises ``ConfigError`` where neither mode
        gives the model's own logits."""
        super().__init__(facts, storage)
        self.model = model
        self._index = index
        self._takes = set(inspect.signature(type(model).forward).parameters)
        layers = max(index) + 1
        self._cache = PackedCache(storage, index, layers)
        self._own_attention: str | None = model.config._attn_implementation
        self._name = register(self, self._cache.attention)
        self._rotary = LengthRotary(model)
        if self._rotary.switch is not None and self._rotary.switch.border < facts.max_positions:
            self.switch = self._rotary.switch
        self.packed = True
        self._choose_mode()

    def _choose_mode(self) -> None:
        reasons = []
        reference = self._reference()
        for packed in (True, False):
            self.packed = packed
            reason = self._try(reference)
            if reason is None:
                return
            reasons.append(f"{'packed' if packed else 'one by one'}: {reason}")
            log.debug("%s: %s", self.facts.architecture, reasons[-1])
        raise ConfigError(
            f"{self.facts.architecture} can't run over the arena ({'; '.join(reasons)})"
        )

    def _probes(self) -> list[list[int]]:
        vocab = self.facts.vocab_size
        return [[(7 + 3 * i) % vocab for i in range(6)], [(5 * i + 1) % vocab for i in range(9)]]

    def _reference(self) -> list[Tensor]:
        """The model's own logits of the last three rows of each probe, without a cache."""
        with torch.inference_mode():
            return [
                self.model(
                    input_ids=torch.tensor([ids], device=self.storage.device), use_cache=False
                ).logits[0, -3:]
                for ids in self._probes()
            ]

    def _try(self, reference: Sequence[Tensor]) -> str | None:
        """Forwards the probes in two passes with a rollback between; what went wrong, or None."""
        extents: list[Extent] = []
        try:
            self._set_attention(self._name if self.packed else self._own_attention)
            with torch.inference_mode():
                probes = self._probes()
                extents = [self.arena.admit(16) for _ in probes]
                self.forward([Span(e, 0, p[:-2], 1) for e, p in zip(extents, probes, strict=True)])
                for extent, ids in zip(extents, probes, strict=True):
                    self.arena.rollback(extent, len(ids) - 3)
                logits = self.forward(
                    [Span(e, len(p) - 3, p[-3:], 3) for e, p in zip(extents, probes, strict=True)]
                )
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            for extent in extents:
                self.arena.free(extent)
        wanted = torch.cat(list(reference)).float()
        if logits.shape != wanted.shape:
            return f"logits of shape {tuple(logits.shape)} instead of {tuple(wanted.shape)}"
        off = (logits.float() - wanted).abs().max().item()
        allowed = 1e-3 if self.storage.dtype == torch.float32 else 6e-2
        if not off <= allowed * max(1.0, wanted.abs().max().item()):
            return f"logits differ from the model's own by {off:.2g}"
        return None

    def _set_attention(self, name: str | None) -> None:
        # Set on the configs that the modules hold, which is where they look at each call;
        # the model's own setter would refuse where its class knows only its own kernels.
        for module in self.model.modules():
            config = getattr(module, "config", None)
            if config is not None and hasattr(config, "_attn_implementation"):
                config._attn_implementation = name

    def _forward(self, spans: Sequence[Span]) -> Tensor:
        if self.packed:
            return self._forward_packed(spans)
        return torch.cat([self._forward_one(span) for span in spans])

    def _forward_packed(self, spans: Sequence[Span]) -> Tensor:
        ids: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        for span in spans:
            ids.extend(span.tokens)
            positions.extend(range(span.start, span.end))
            wanted.extend(range(len(ids) - span.wanted, len(ids)))
        if "position_ids" not in self._takes:
            raise ConfigError("its forward takes no positions")
        device = self.storage.device
        self._cache.spans = pack(self.storage, spans)
        try:
            with self._rotary.turning(spans, device):
                return self._logits(
                    torch.tensor([ids], device=device),
                    torch.tensor(wanted, device=device, dtype=torch.long),
                    position_ids=torch.tensor([positions], device=device),
                    past_key_values=self._cache,
                )
        finally:
            self._cache.spans = ()

    def _forward_one(self, span: Span) -> Tensor:
        rows = len(span.tokens)
        device = self.storage.device
        extra: dict[str, Any] = {}
        if "position_ids" in self._takes:
            extra["position_ids"] = torch.arange(span.start, span.start + rows, device=device)[None]
        cache = ArenaCache(self.storage, [span.extent], self._index, seen=span.start)
        with self._rotary.turning([span], device):
            return self._logits(
                torch.tensor([list(span.tokens)], device=device),
                torch.arange(rows - span.wanted, rows, device=device),
                past_key_values=cache,
                attention_mask=torch.ones(1, span.start + rows, dtype=torch.long, device=device),
                **extra,
            )

    def _logits(self, ids: Tensor, wanted: Tensor, **inputs: Any) -> Tensor:
        if "logits_to_keep" in self._takes and wanted.numel():
            logits = self.model(input_ids=ids, use_cache=True, logits_to_keep=wanted, **inputs)
            return logits.logits[0]  # type: ignore[no-any-return]
        logits = self.model(input_ids=ids, use_cache=True, **inputs).logits[0]
        return logits.index_select(0, wanted)  # type: ignore[no-any-return]
