"""The fast path for the Llama block family on a CUDA device: kernels, graphs, exact numerics.

Every forward is a chain of kernels (``forward``); one of up to 512 rows is captured as a CUDA
graph the second time its sizes are asked for. The graph begins with the one copy that brings
the step's numbers and ends with the one that takes its tokens back, so a round is one launch
and one wait. A row's logits are the same bits whatever else is in the batch: see
docs/numerics.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from outrider.kernels.attention_shapes import FEW_ROWS, need
from outrider.kernels.linear_shapes import FEW_ROWS as FEW_LINEAR_ROWS
from outrider.kernels.operation import Call, Tools
from outrider.kernels.registry import Choice
from outrider.shared.core.model_facts import ModelFacts
from outrider.shared.core.rules import REJECTION
from outrider.shared.core.types import Decoding, SparseRow
from outrider.shared.kv.storage import Storage
from outrider.shared.link.device.mailbox import DeviceMailbox
from outrider.shared.model.cuda.forward import Forward, resolve_all
from outrider.shared.model.cuda.graphs import Graphs
from outrider.shared.model.cuda.launches import Launches
from outrider.shared.model.cuda.passes import (
    GRAPH_ROWS,
    HEAD_ROWS,
    MAX_SEQUENCES,
    POWERS,
    PassLimits,
    bucket,
    cut_spans,
    rows_in_order,
)
from outrider.shared.model.cuda.rejection import fits
from outrider.shared.model.cuda.support import judged, simple
from outrider.shared.model.cuda.tuning import Tuning, tuning_for
from outrider.shared.model.cuda.turns.stream import CudaStream, DeviceStream
from outrider.shared.model.cuda.turns.turns import Parts, Turns
from outrider.shared.model.cuda.weights import Weights, weights_of
from outrider.shared.model.llama.runner import LlamaRunner
from outrider.shared.model.runner import Span

TurnsT = TypeVar("TurnsT", bound=Turns)
# Scratch memory of attention at most; a batch that needs more is forwarded in several passes.
_WORK_BYTES = 256 << 20
# Rows of a pass at most, and the share of a device's memory that what they need may take: a base
# and a draft each have their own beside weights and arena.
_PATIENCE = 3
"""Plain runs of a size in rounds that somebody waits for, before one of them captures it."""
_PENDING = 2
"""Rows that a sequence brings to its proposal at most: its pending token, and after full acceptance
the one before it."""
_PASS_ROWS = 4096
_PASS_SHARE = 1 / 64


class CudaRunner(LlamaRunner):
    """Forwards a model of the Llama block family with this project's kernels."""

    def __init__(
        self,
        model: Any,
        facts: ModelFacts,
        storage: Storage,
        *,
        max_k: int,
        tuning: Tuning | None = None,
        calls: dict[str, Call] | None = None,
        graphs: bool = True,
    ) -> None:
        """Takes over the weights of ``model``.

        ``max_k``: most tokens of a proposal. ``calls``: instead of the best operations that work
        here.
        """
        super().__init__(model, facts, storage)
        self._max_k = max_k
        self.choices: list[Choice] = []
        if calls is None:
            calls, self.choices = resolve_all(Tools(storage.device), storage.dtype)
        sizes = (self._heads, self._kv_heads, self._dim)
        weights = weights_of(model, self._blocks, storage, sizes, self._cos.shape[0])
        heads = weights.layers[0].heads
        self._geometry = heads
        capacity = _WORK_BYTES // (4 * heads.head_dim)
        longest = need(heads, [max(p.tokens for p in self.arena.pools)], FEW_ROWS)
        work = min(capacity, max(longest, need(heads, [64] * 64, FEW_ROWS) // 8))
        self._step = Forward(
            weights, calls, PassLimits(_pass_rows(weights), work),
            tuning or tuning_for(weights.embedding.shape[1]),
        )  # fmt: skip
        enabled = graphs and storage.device.type == "cuda"
        self._graphs = Graphs(enabled=enabled, patience=_PATIENCE)
        self.works_between = enabled
        self._launches = Launches(self._step, self._graphs, len(self.arena.pools), max_k)

    def turns(
        self,
        kind: Callable[[Parts, DeviceMailbox, DeviceStream], TurnsT],
        mailbox: DeviceMailbox,
        stream: DeviceStream | None = None,
    ) -> TurnsT:
        """Turns that the device takes by itself; ``stream``: instead of the device's own."""
        device = self.storage.device
        if stream is None:
            # Graphs of its own: they hold addresses of this mailbox, and go when it goes.
            stream = CudaStream(device, Graphs(enabled=self._graphs.enabled))
        pools = len(self.arena.pools)
        return kind(Parts(self._step, self._geometry, pools, self._max_k, device), mailbox, stream)

    def between(self) -> bool:
        """See ``Runner.between``: captures."""
        with self._on_device(), torch.inference_mode():
            return self._graphs.capture_one()

    def time_device(self, *, timed: bool) -> None:
        """See ``Runner.time_device``."""
        self._launches.timed = timed

    def device_seconds(self) -> float | None:
        """See ``Runner.device_seconds``."""
        return self._launches.seconds()

    @property
    def workspace_bytes(self) -> int:
        """Device memory beside weights and arena."""
        return self._step.workspace_bytes

    # -- forwards ----------------------------------------------------------------------------

    def _forward(self, spans: Sequence[Span]) -> Tensor:
        parts: list[Tensor] = []
        order: list[tuple[int, int]] = []
        with self._on_device():
            for taken in cut_spans(spans, self._geometry, self._step.limits):
                wanted = sum(piece.wanted for _, piece in taken)
                self._launches.forward([piece for _, piece in taken])
                if wanted:
                    parts.append(self._step.logits[:wanted].clone())
                order += [(i, piece.wanted) for i, piece in taken if piece.wanted]
        if not parts:
            return torch.empty(
                0, self.facts.vocab_size, dtype=torch.float32, device=self.storage.device
            )
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        rows = rows_in_order(order)
        if rows is not None:
            logits = logits.index_select(0, torch.tensor(rows, device=self.storage.device))
        return logits

    # -- rounds on the device ----------------------------------------------------------------

    def judge(
        self,
        spans: Sequence[Span],
        decodings: Sequence[Decoding],
        proposals: Sequence[Sequence[int]],
        rows: Sequence[Sequence[SparseRow]] | None = None,
    ) -> list[tuple[int, int]] | None:
        """See ``Runner.judge``."""
        rows = rows if rows is not None else [()] * len(spans)
        asked = [i for i, span in enumerate(spans) if span.wanted]
        if not all(judged(decodings[i]) for i in asked) or not fits(rows):
            return None
        limit = self.arena.max_rows
        if any(
            span.wanted > HEAD_ROWS or (limit is not None and len(span.tokens) > limit)
            for span in spans
        ):
            return None
        self.check(spans)
        found: dict[int, tuple[int, int]] = {}
        with self._writing(spans), self._on_device():
            for taken in cut_spans(spans, self._geometry, self._step.limits):
                pieces, own = [piece for _, piece in taken], [i for i, _ in taken]
                wanted = [i for i, piece in taken if piece.wanted]
                if not wanted:
                    self._launches.forward(pieces)
                    continue
                verdicts = self._launches.judge(
                    pieces, [decodings[i] for i in own], [proposals[i] for i in own],
                    [rows[i] for i in own],
                )  # fmt: skip
                found |= dict(zip(wanted, verdicts, strict=True))
        return [found[i] for i in asked]

    def propose(
        self, spans: Sequence[Span], decodings: Sequence[Decoding], ks: Sequence[int]
    ) -> list[list[int]] | None:
        """See ``Runner.propose``."""
        asked = [i for i, k in enumerate(ks) if k > 0]
        drawn = [span for span, k in zip(spans, ks, strict=True) if k > 0]
        if not asked or max(ks) > self._max_k or not all(simple(decodings[i]) for i in asked):
            return None
        if len(asked) > MAX_SEQUENCES:
            return None
        limit = self.arena.max_rows
        if limit is not None and max(ks) + 1 > limit:
            return None
        # Prefill goes ahead as a plain forward, so that the graph is one of few that come often.
        ahead = [span for span, k in zip(spans, ks, strict=True) if k == 0]
        room = _PENDING
        last: list[Span] = []
        for span in drawn:
            extra = max(0, len(span.tokens) - room)
            if extra:
                ahead.append(span.part(0, extra))
            last.append(span.part(extra, len(span.tokens)))
        if ahead:
            self.forward(ahead)
        self.check(last)
        rows = sum(len(span.tokens) for span in last)
        if not self._whole(last, rows):
            raise AssertionError("spans were cut to fit")
        ends = [span.end + ks[i] - 1 for i, span in zip(asked, last, strict=True)]
        with self._writing(last, ends), self._on_device():
            found = self._launches.propose(
                last, [decodings[i] for i in asked], [ks[i] for i in asked]
            )
        answers: list[list[int]] = [[] for _ in spans]
        for i, tokens in zip(asked, found, strict=True):
            answers[i] = tokens
        return answers

    # -- parts -------------------------------------------------------------------------------

    def _on_device(self) -> AbstractContextManager[object]:
        device = self.storage.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def _whole(self, spans: Sequence[Span], rows: int) -> bool:
        """Whether one pass takes all spans."""
        if not 0 < rows <= HEAD_ROWS or len(spans) > MAX_SEQUENCES:
            return False
        limit = self.arena.max_rows
        longest = max(len(span.tokens) for span in spans)
        if limit is not None and longest > limit:
            return False
        ends = [span.end + self._max_k for span in spans]
        return need(self._geometry, ends, bucket(longest, POWERS)) <= self._step.limits.work

    def warm_up(self, progress: Callable[[str], None] = lambda message: None) -> None:
        """Compiles what prompts need and captures what a single sequence needs, before the first
        request.

        Uses a sequence of its own, which is freed again; where the arena has no room for it,
        kernels are compiled and graphs captured as they are needed.
        """
        arena = self.arena
        progress("compiling kernels for prompts")
        for count in (FEW_LINEAR_ROWS + 1, GRAPH_ROWS + 1):
            if count <= min(arena.largest_free, arena.max_rows or count, self.places(count)):
                extent = arena.admit(count)
                try:
                    self.forward([Span(extent, 0, [0] * count, 1)])
                finally:
                    arena.free(extent)
        rows = self._max_k + 1
        if arena.largest_free < 4 * rows or not self._graphs.enabled:
            return
        extent = arena.admit(4 * rows)
        greedy = Decoding()
        try:
            for count in range(1, rows + 1):
                progress(f"capturing graphs, {count} of {rows}")
                for _ in range(2):
                    span = Span(extent, 0, [0] * count, count)
                    if self.judge([span], [greedy], [[0] * (count - 1)]) is None:
                        return
                    arena.rollback(extent, 0)
                for pending in (1, 2):
                    for _ in range(2):
                        if count <= self._max_k:
                            self.propose([Span(extent, 0, [0] * pending, 1)], [greedy], [count])
                            arena.rollback(extent, 0)
            # Few ask for rejection: its kernel is compiled here, its graphs wait to be needed.
            drawn = Decoding(temperature=1.0, rule=REJECTION)
            self.judge([Span(extent, 0, [0] * rows, rows)], [drawn], [[0] * self._max_k])
            arena.rollback(extent, 0)
        finally:
            arena.free(extent)
        while self.between():
            pass


def _pass_rows(weights: Weights) -> int:
    """Rows of a pass, so that what it writes stays small beside the device's memory."""
    device, layer = weights.embedding.device, weights.layers[0]
    if device.type != "cuda":
        return 2 * HEAD_ROWS
    # x, x normalised, what is attended; q, k, v; the gated activation: 16 bits each.
    hidden, gated = layer.down.shape
    row = 2 * (2 * hidden + layer.output.shape[1] + layer.qkv.shape[0] + 2 * gated)
    room = torch.cuda.get_device_properties(device).total_memory * _PASS_SHARE
    return min(_PASS_ROWS, max(2 * HEAD_ROWS, 1 << int(room / row).bit_length() - 1))
