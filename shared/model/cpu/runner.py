"""The Llama block family on a CPU: the whole forward is one call of a compiled function.

A row's logits are the same bits alone, in any batch, with any K, in one piece or in chunks, and
with any number of threads (``kernels/cpu`` says why). Activations and sums are float32; weights
and KV are kept in their own type, weights in 16 bits where that loses nothing.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outrider.kernels.cpu import compile as kernels
from outrider.kernels.cpu.shape import KernelShape, columns_for
from outrider.kernels.cpu.team import openmp
from outrider.shared.core.model_facts import ModelFacts
from outrider.shared.kv.storage import Storage
from outrider.shared.model.cpu.batch import BatchTable
from outrider.shared.model.cpu.tables import MAX_ROWS, WORD, ModelTable
from outrider.shared.model.cpu.team import Team
from outrider.shared.model.cpu.weights import narrowest
from outrider.shared.model.runner import Runner, Span


def why_not(model: Any, storage: Storage) -> str | None:
    """Why these kernels can't run a model of the Llama block family; None where they can."""
    if storage.device.type != "cpu":
        return f"the device is {storage.device.type}"
    config = model.config
    if config.hidden_size % 8:
        return f"its hidden size {config.hidden_size} is not a multiple of 8"
    if _head_dim(config) % 2:
        return f"its head size {_head_dim(config)} is odd"
    return kernels.why_not()


class CpuRunner(Runner):
    """Forwards a model of the Llama block family; see ``why_not`` for which."""

    def __init__(
        self,
        model: Any,
        facts: ModelFacts,
        storage: Storage,
        *,
        threads: int = 1,
        kept: Path | None = None,
        release: bool = False,
    ) -> None:
        """Packs the weights of ``model`` (a module with transformers' names).

        ``threads``: the most that run a forward; see ``use``. ``kept``: the folder for compiled
        code. ``release``: the module may be emptied on the way.
        """
        super().__init__(facts, storage)
        kind = narrowest((p.data for p in model.parameters()), storage.dtype)
        self.shape = KernelShape(
            WORD[kind],
            WORD[storage.dtype],
            _head_dim(model.config),
            columns_for(kernels.vector_lanes()),
        )
        self._call = kernels.CompiledForward(self.shape, kept)
        self.threads = threads if openmp() is not None else 1
        positions = max(1, min(facts.max_positions, max(p.tokens for p in self.arena.pools)))
        if all(one.window is not None for one in storage.kinds):
            positions = facts.max_positions
        self._table = ModelTable(
            model,
            storage,
            self.shape,
            positions=positions,
            threads=self.threads,
            release=release,
        )
        self.facts = replace(facts, weight_bytes=self._table.weight_bytes)
        config = model.config
        self.sizes = (
            f"{config.num_hidden_layers} layers of {config.hidden_size} and "
            f"{config.intermediate_size}, {facts.vocab_size} tokens"
        )
        """What the time of a forward depends on besides ``shape``."""
        self._tables = array("q", [self._table.words.buffer_info()[0], 0])
        self.use(self.threads)

    def use(self, team: int, *, fixed: bool = False) -> None:
        """``team`` threads run a forward from now on, and others when that becomes faster, but
        where it is ``fixed``. Changes no result."""
        self._team = Team(team) if fixed else Team(self.threads, team)
        self.facts = replace(
            self.facts,
            kernels=f"compiled for {kernels.processor_name()}, {self.shape.columns} columns, "
            f"weights kept as {self.shape.weights}, {team} of {self.threads} threads",
        )

    @property
    def cores(self) -> int:
        """Threads that run a forward when nobody else wants the cores."""
        return self._team.usual

    def _forward(self, spans: Sequence[Span]) -> Tensor:
        rows = sum(len(span.tokens) for span in spans)
        if rows <= MAX_ROWS:
            return self._pass(spans)
        return torch.cat([self._pass(part) for part in _parts(spans)])

    def _pass(self, spans: Sequence[Span]) -> Tensor:
        batch = BatchTable(self.arena, spans)
        logits = torch.empty(batch.wanted, self._table.vocabulary_width)
        batch.write_to(logits)
        self._tables[1] = batch.words.buffer_info()[0]
        size = self._team.next(batch.rows)
        begin = time.perf_counter()
        self._call(self._tables.buffer_info()[0], size)
        self._team.took(batch.rows, size, time.perf_counter() - begin)
        if self._table.vocabulary_width == self.facts.vocab_size:
            return logits
        return logits[:, : self.facts.vocab_size].contiguous()


def _parts(spans: Sequence[Span]) -> list[list[Span]]:
    """Cuts spans into passes of at most ``MAX_ROWS``, in order."""
    passes: list[list[Span]] = [[]]
    room = MAX_ROWS
    for span in spans:
        begin, rows = 0, len(span.tokens)
        while begin < rows:
            if not room:
                passes.append([])
                room = MAX_ROWS
            end = min(rows, begin + room)
            wanted = max(0, min(end - begin, end - (rows - span.wanted)))
            passes[-1].append(Span(span.extent, span.start + begin, span.tokens[begin:end], wanted))
            room -= end - begin
            begin = end
    return passes


def _head_dim(config: Any) -> int:
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)
