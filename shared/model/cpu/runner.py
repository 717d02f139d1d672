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
from outrider.kernels.operation import word
from outrider.shared.core.model_facts import ModelFacts
from outrider.shared.core.types import Decoding, SparseRow
from outrider.shared.kv.storage import Storage
from outrider.shared.model.cpu.batch import BatchTable
from outrider.shared.model.cpu.tables import MAX_ROWS, ModelTable
from outrider.shared.model.cpu.team import Team
from outrider.shared.model.cpu.weights import narrowest
from outrider.shared.model.llama.shapes import head_dim, positions_of
from outrider.shared.model.runner import Runner, Span
from outrider.shared.sampling.choose import takes_likeliest


def why_not(model: Any, storage: Storage) -> str | None:
    """Why these kernels can't run a model of the Llama block family; None where they can."""
    if storage.device.type != "cpu":
        return f"the device is {storage.device.type}"
    config = model.config
    if config.hidden_size % 8:
        return f"its hidden size {config.hidden_size} is not a multiple of 8"
    if head_dim(config) % 2:
        return f"its head size {head_dim(config)} is odd"
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
            word(kind),
            word(storage.dtype),
            head_dim(model.config),
            columns_for(kernels.vector_lanes()),
        )
        self._call = kernels.CompiledForward(self.shape, kept)
        self.threads = threads if openmp() is not None else 1
        self._table = ModelTable(
            model,
            storage,
            self.shape,
            positions=positions_of(facts, storage),
            threads=self.threads,
            release=release,
        )
        size = facts.weight_bytes * kind.itemsize // storage.dtype.itemsize
        self.facts = replace(facts, weight_bytes=size)
        config = model.config
        self.sizes = (
            f"{config.num_hidden_layers} layers of {config.hidden_size} and "
            f"{config.intermediate_size}, {facts.vocab_size} tokens"
        )
        """What the time of a forward depends on besides ``shape``."""
        self._words = array("q", [self._table.words.buffer_info()[0], 0, 0])
        self.use(self.threads)

    def use(self, team: int) -> None:
        """``team`` threads run a forward from now on, and others when that becomes faster; changes
        no result."""
        self._team = Team(self.threads, team)
        self.facts = replace(
            self.facts,
            kernels=f"{kernels.description(self.shape.columns)}, "
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
        logits = self._logits(batch.wanted)
        batch.write_to(logits)
        self._run([batch], batch.rows)
        if self._table.vocabulary_width == self.facts.vocab_size:
            return logits
        return logits[:, : self.facts.vocab_size].contiguous()

    def judge(
        self,
        spans: Sequence[Span],
        decodings: Sequence[Decoding],
        proposals: Sequence[Sequence[int]],
        rows: Sequence[Sequence[SparseRow]] | None = None,
    ) -> list[tuple[int, int]] | None:
        """See ``Runner.judge``: where every sequence takes the likeliest token."""
        asked = [d for d, span in zip(decodings, spans, strict=True) if span.wanted]
        if not all(map(takes_likeliest, asked)) or not self._in_one_pass(spans):
            return None
        self.check(spans)
        with self._writing(spans):
            batch = BatchTable(self.arena, spans)
            batch.write_to(self._logits(batch.wanted))
            chosen = batch.choose()
            self._run([batch], batch.rows)
        verdicts, first = [], 0
        for span, proposal in zip(spans, proposals, strict=True):
            if not span.wanted:
                continue
            accepted = 0
            while accepted < len(proposal) and chosen[first + accepted] == proposal[accepted]:
                accepted += 1
            verdicts.append((accepted, chosen[first + accepted]))
            first += span.wanted
        return verdicts

    def propose(
        self, spans: Sequence[Span], decodings: Sequence[Decoding], ks: Sequence[int]
    ) -> list[list[int]] | None:
        """See ``Runner.propose``: where every sequence takes the likeliest token.

        All steps are one call. Sequences with the larger K come first, so that those still at
        work in a later step are the first of what the step before has chosen.
        """
        asked = [i for i, k in enumerate(ks) if k > 0]
        if not asked or not self._in_one_pass(spans):
            return None
        if not all(takes_likeliest(decodings[i]) for i in asked):
            return None
        asked.sort(key=lambda i: -ks[i])
        ends = [span.end + max(k - 1, 0) for span, k in zip(spans, ks, strict=True)]
        self.check(spans)
        if any(end > span.extent.capacity for span, end in zip(spans, ends, strict=True)):
            return None
        limit = self.arena.max_rows
        if limit is not None and any(
            end - span.start > limit for span, end in zip(spans, ends, strict=True)
        ):
            return None
        with self._writing(spans, ends):
            found = self._chain(spans, asked, ks)
        answers: list[list[int]] = [[] for _ in spans]
        for place, i in enumerate(asked):
            tokens = [chosen[place] for chosen in found[: ks[i]]]
            answers[i] = tokens[: tokens.index(-1) + 1] if -1 in tokens else tokens
        return answers

    def _chain(
        self, spans: Sequence[Span], asked: Sequence[int], ks: Sequence[int]
    ) -> list[array[int]]:
        """The choices of each step; ``asked``: places of those with a K, larger ones first."""
        others = [span for span, k in zip(spans, ks, strict=True) if k == 0]
        logits = self._logits(len(asked))
        steps: list[BatchTable] = []
        found: list[array[int]] = []
        for step in range(ks[asked[0]]):
            at_work = [spans[i] for i in asked if ks[i] > step]
            if step:
                # The token is not known yet.
                at_work = [Span(span.extent, span.end + step - 1, (0,), 1) for span in at_work]
            batch = BatchTable(self.arena, at_work if step else [*at_work, *others])
            batch.write_to(logits)
            if step:
                batch.follow(found[-1])
            steps.append(batch)
            found.append(batch.choose())
        # A number of its own for the time of so many steps.
        self._run(steps, -sum(batch.rows for batch in steps))
        return found

    def _in_one_pass(self, spans: Sequence[Span]) -> bool:
        if sum(len(span.tokens) for span in spans) > MAX_ROWS:
            return False
        limit = self.arena.max_rows
        return limit is None or all(len(span.tokens) <= limit for span in spans)

    def _logits(self, rows: int) -> Tensor:
        return torch.empty(rows, self._table.vocabulary_width)

    def _run(self, batches: Sequence[BatchTable], kind: int) -> None:
        """``kind``: calls of one kind take about the same time; see ``Team``."""
        places = array("q", [batch.words.buffer_info()[0] for batch in batches])
        self._words[1], self._words[2] = places.buffer_info()
        size = self._team.next(kind)
        begin = time.perf_counter()
        self._call(self._words.buffer_info()[0], size)
        self._team.took(kind, size, time.perf_counter() - begin)


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
            passes[-1].append(span.part(begin, end))
            room -= end - begin
            begin = end
    return passes
