"""What the host asks of the device in a step: numbers up, one launch, tokens back.

The numbers go to fixed buffers (``inputs``), the chain of kernels is a graph for its sizes
(``graphs``), and what it chose comes back to pinned memory. Spans are taken as they are: that
they fit in one pass, and what becomes of their extents, is the runner's concern.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from outrider.shared.core.types import Decoding, SparseRow
from outrider.shared.model.cuda.forward import Forward
from outrider.shared.model.cuda.graphs import Graphs
from outrider.shared.model.cuda.inputs import Field, Inputs
from outrider.shared.model.cuda.passes import (
    GRAPH_ROWS,
    HEAD_ROWS,
    MAX_SEQUENCES,
    POWERS,
    ROW_SIZES,
    bucket,
    row_size,
)
from outrider.shared.model.cuda.rejection import Draws, draws
from outrider.shared.model.cuda.step import batch_of, draft_step, numbers, places, signed
from outrider.shared.model.runner import Span


class Launches:
    """The steps of one model. Calls come from one thread, in the model's context."""

    def __init__(self, step: Forward, graphs: Graphs, pools: int, max_k: int) -> None:
        """``pools``: of the arena; ``max_k``: most tokens of a proposal."""
        device, steps = step.logits.device, max(max_k, 1)
        pin = device.type == "cuda"
        self._step, self._graphs, self._device = step, graphs, device
        self._inputs = Inputs(
            [*numbers(pools, steps, step.limits.rows), Field("judged", (HEAD_ROWS,))], device
        )
        self._iota = torch.arange(MAX_SEQUENCES, dtype=torch.int32, device=device)
        self._chosen = torch.zeros(steps, HEAD_ROWS, dtype=torch.int32, device=device)
        self._verdicts = torch.zeros(MAX_SEQUENCES, 2, dtype=torch.int32, device=device)
        self._chosen_host = torch.zeros(self._chosen.shape, dtype=torch.int32, pin_memory=pin)
        self._verdicts_host = torch.zeros(self._verdicts.shape, dtype=torch.int32, pin_memory=pin)
        self._draws = Draws(device)
        self._pending = False
        self.timed = False
        """Whether the device's time is noted, for ``seconds``."""
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def seconds(self) -> float | None:
        """What the device took since this was last asked; None where it was not noted."""
        marks, self._marks = self._marks, []
        if not marks:
            return None
        marks[-1][1].synchronize()
        return sum(float(began.elapsed_time(done)) for began, done in marks) / 1e3

    def forward(self, spans: Sequence[Span]) -> None:
        """Takes the rows in; the wanted ones among them leave their logits in the step."""
        size, rows = self._bring(spans)
        wanted = sum(span.wanted for span in spans)
        picks = self._pick(spans, rows)
        heads = size[0] if picks is None else bucket(wanted, ROW_SIZES) if wanted else 0
        step, batch = self._step, batch_of(self._inputs.device)

        def run() -> None:
            self._inputs.upload()
            step.run(batch, *size, head=False)
            if wanted:
                step.head(heads, picks)

        self._execute(("forward", *size, heads, picks is None), rows, run)

    def judge(
        self,
        spans: Sequence[Span],
        decodings: Sequence[Decoding],
        proposals: Sequence[Sequence[int]],
        sparse: Sequence[Sequence[SparseRow]],
    ) -> list[tuple[int, int]]:
        """(accepted, next token) of each sequence that has wanted rows, of which there are some.

        ``sparse``: rows of the rule ``rejection``.
        """
        size, rows = self._bring(spans)
        picks = self._pick(spans, rows)
        # Lists first: an array takes one assignment of many numbers as fast as one of one.
        tokens: list[int] = []
        temperatures: list[float] = []
        seeds: list[int] = []
        positions: list[int] = []
        pending: list[int] = []
        proposed: list[int] = []
        drawn = 0
        self._draws.begin()
        for span, d, proposal, offered in zip(spans, decodings, proposals, sparse, strict=True):
            wanted, end = span.wanted, span.end
            if not wanted:
                continue
            tokens += span.tokens[-wanted:]
            temperatures += [d.temperature] * wanted
            seeds += [signed(d.seed)] * wanted
            positions += range(end - wanted + 1, end + 1)
            first = len(tokens) - len(proposal) - 1
            if draws(d, proposal):
                self._draws.place(len(pending), first, proposal, offered)
                drawn += 1
            pending.append(first)
            proposed.append(len(proposal))
        head, judged, host = len(tokens), len(pending), self._inputs.host
        count = size[0] if picks is None else bucket(head, ROW_SIZES)
        sequences = bucket(judged, POWERS)
        host["judged"][:head] = tokens
        host["temperatures"][:count] = temperatures + [0.0] * (count - head)
        host["seeds"][:head] = seeds
        host["noise_positions"][:head] = positions
        host["pending"][:sequences] = pending + [0] * (sequences - judged)
        host["proposed"][:sequences] = proposed + [0] * (sequences - judged)
        step, own_side, batch = self._step, self._inputs.device, batch_of(self._inputs.device)
        verdicts = self._verdicts[:sequences]
        # Each kernel judges the sequences of its rules; a round without any leaves it out.
        compared = drawn < judged

        def run() -> None:
            self._inputs.upload()
            if drawn:
                self._draws.upload()
            step.run(batch, *size, head=False)
            step.head(count, picks)
            if compared:
                step.choose(
                    count, None, own_side["temperatures"], own_side["seeds"],
                    own_side["noise_positions"], self._chosen[0],
                )  # fmt: skip
                step.accept(
                    self._chosen[0], own_side["judged"], own_side["pending"], own_side["proposed"],
                    verdicts,
                )  # fmt: skip
            if drawn:
                self._draws.run(step, count, own_side, verdicts)
            self._verdicts_host.copy_(self._verdicts, non_blocking=True)

        key = ("judge", *size, count, sequences, picks is None, compared, drawn > 0)
        self._execute(key, rows, run)
        self._wait()
        found = self._verdicts_host[:judged].tolist()
        return [(accepted, token) for accepted, token in found]

    def propose(
        self, spans: Sequence[Span], decodings: Sequence[Decoding], ks: Sequence[int]
    ) -> list[list[int]]:
        """Per sequence its ``k`` next tokens; every k is 1 or more."""
        size, rows = self._bring(spans)
        host, begin, steps = self._inputs.host, 0, max(ks)
        host["active"][:] = 0
        for s, (span, d, k) in enumerate(zip(spans, decodings, ks, strict=True)):
            begin += len(span.tokens)
            host["picks"][s] = begin - 1
            host["temperatures"][s] = d.temperature
            host["seeds"][s] = signed(d.seed)
            host["noise_positions"][s] = span.end
            host["active"][:k, s] = 1
        count, sequences = len(spans), size[1]
        host["picks"][count:sequences] = 0
        host["temperatures"][count:sequences] = 0
        host["noise_positions"][count:sequences] = 0
        step, own = self._step, self._inputs.device
        picks = None if rows == count else own["picks"]

        def run() -> None:
            self._inputs.upload()
            for j in range(steps):
                draft_step(step, own, size, picks, self._iota, self._chosen, j)
            self._chosen_host[:steps].copy_(self._chosen[:steps], non_blocking=True)

        self._execute(("propose", *size, steps, picks is None), rows, run)
        self._wait()
        found = self._chosen_host[:steps, :count].T.tolist()
        return [tokens[:k] for tokens, k in zip(found, ks, strict=True)]

    # -- parts -------------------------------------------------------------------------------

    def _bring(self, spans: Sequence[Span]) -> tuple[tuple[int, int, int], int]:
        """Writes where the rows stand; returns what the pass is launched for (rows, sequences and
        most rows of one sequence) and how many rows there are."""
        if self._pending:
            # The copy of the step before may still read the buffer.
            self._wait()
        host, tokens, count = self._inputs.host, list[int](), len(spans)
        first_rows: list[int] = []
        for span in spans:
            first_rows.append(len(tokens))
            tokens += span.tokens
        counts = [len(span.tokens) for span in spans]
        places(host, [span.extent for span in spans])
        host["first_rows"][:count] = first_rows
        host["row_counts"][:count] = counts
        host["row_counts"][count:] = 0
        host["positions"][:count] = [span.start for span in spans]
        row, longest = len(tokens), max(counts)
        size = row_size(row)
        host["tokens"][:row] = tokens
        host["tokens"][row:size] = 0
        return (size, bucket(len(spans), POWERS), bucket(longest, POWERS)), row

    def _pick(self, spans: Sequence[Span], rows: int) -> Tensor | None:
        """Writes which rows are wanted; None where all are."""
        picks: list[int] = []
        begin = 0
        for span in spans:
            begin += len(span.tokens)
            picks += range(begin - span.wanted, begin)
        if len(picks) == rows:
            return None
        host = self._inputs.host["picks"]
        host[: len(picks)] = picks
        host[len(picks) :] = 0
        return self._inputs.device["picks"]

    def _execute(self, key: tuple[object, ...], rows: int, run: Callable[[], None]) -> None:
        self._pending = True
        began = self._mark()
        if rows > GRAPH_ROWS:
            run()
        else:
            self._graphs.run(key, run)
        done = self._mark()
        if began is not None and done is not None:
            self._marks.append((began, done))

    def _mark(self) -> torch.cuda.Event | None:
        if not self.timed or self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self._pending = False
