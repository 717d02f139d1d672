"""What the host asks of the device in a step: numbers up, one launch, tokens back.

The numbers go to fixed buffers (``inputs``), the chain of kernels is a graph for its sizes
(``graphs``), and what it chose comes back to pinned memory. Spans are taken as they are: that
they fit in one pass, and what becomes of their extents, is the runner's concern.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from outrider.kernels.linear_shapes import MAX_ROWS
from outrider.shared.core.types import Decoding, SparseRow
from outrider.shared.model.cuda.forward import Forward
from outrider.shared.model.cuda.graphs import Graphs
from outrider.shared.model.cuda.inputs import Inputs
from outrider.shared.model.cuda.passes import MAX_SEQUENCES, POWERS, ROW_SIZES, bucket
from outrider.shared.model.cuda.rejection import Draws, draws
from outrider.shared.model.cuda.step import batch_of, draft, numbers, place, signed
from outrider.shared.model.runner import Span


class Launches:
    """The steps of one model. Calls come from one thread, in the model's context."""

    def __init__(self, step: Forward, graphs: Graphs, pools: int, max_k: int) -> None:
        """``pools``: of the arena; ``max_k``: most tokens of a proposal."""
        device, steps = step.logits.device, max(max_k, 1)
        pin = device.type == "cuda"
        self._step, self._graphs, self._device = step, graphs, device
        self._inputs = Inputs(numbers(pools, steps), device)
        self._iota = torch.arange(MAX_SEQUENCES, dtype=torch.int32, device=device)
        self._chosen = torch.zeros(steps, MAX_ROWS, dtype=torch.int32, device=device)
        self._verdicts = torch.zeros(MAX_SEQUENCES, 2, dtype=torch.int32, device=device)
        self._chosen_host = torch.zeros(self._chosen.shape, dtype=torch.int32, pin_memory=pin)
        self._verdicts_host = torch.zeros(self._verdicts.shape, dtype=torch.int32, pin_memory=pin)
        self._draws = Draws(device)
        self._pending = False

    def forward(self, spans: Sequence[Span], wanted: int) -> None:
        """Takes the rows in; the ``wanted`` ones among them leave their logits in the step."""
        rows, queries = self._bring(spans)
        picks: list[int] = []
        begin = 0
        for span in spans:
            begin += len(span.tokens)
            picks += range(begin - span.wanted, begin)
        self._inputs.host["picks"][:wanted] = picks
        size = (bucket(rows, ROW_SIZES), bucket(len(spans), POWERS), bucket(queries, POWERS))
        heads = bucket(wanted, ROW_SIZES) if wanted else 0
        all_rows = wanted == rows
        step, batch = self._step, batch_of(self._inputs.device)

        def run() -> None:
            self._inputs.upload()
            step.run(batch, *size, head=False)
            if wanted:
                step.head(heads, None if all_rows else self._inputs.device["picks"])

        self._execute(("forward", *size, heads, all_rows), run)

    def judge(
        self,
        spans: Sequence[Span],
        decodings: Sequence[Decoding],
        proposals: Sequence[Sequence[int]],
        sparse: Sequence[Sequence[SparseRow]],
    ) -> list[tuple[int, int]]:
        """Per sequence (accepted, next token); ``sparse``: rows of the rule ``rejection``."""
        _, queries = self._bring(spans)
        host, rows = self._inputs.host, 0
        self._draws.begin()
        drawn = 0
        for s, (span, d, proposal) in enumerate(zip(spans, decodings, proposals, strict=True)):
            begin, rows = rows, rows + len(span.tokens)
            host["temperatures"][begin:rows] = d.temperature
            host["seeds"][begin:rows] = signed(d.seed)
            host["noise_positions"][begin:rows] = range(
                span.start + 1, span.start + rows - begin + 1
            )
            host["pending"][s] = rows - len(proposal) - 1
            host["proposed"][s] = len(proposal)
            if draws(d, proposal):
                self._draws.place(s, rows - len(proposal) - 1, proposal, sparse[s])
                drawn += 1
        count = bucket(rows, ROW_SIZES)
        sequences = bucket(len(spans), POWERS)
        host["temperatures"][rows:count] = 0
        host["pending"][len(spans) : sequences] = 0
        host["proposed"][len(spans) : sequences] = 0
        step, own, batch = self._step, self._inputs.device, batch_of(self._inputs.device)
        verdicts = self._verdicts[:sequences]
        # Each kernel judges the sequences of its rules; a round without any leaves it out.
        compared = drawn < len(spans)

        def run() -> None:
            self._inputs.upload()
            if drawn:
                self._draws.upload()
            step.run(batch, count, sequences, bucket(queries, POWERS))
            if compared:
                step.choose(
                    count, None, own["temperatures"], own["seeds"], own["noise_positions"],
                    self._chosen[0],
                )  # fmt: skip
                step.accept(
                    self._chosen[0], own["tokens"], own["pending"], own["proposed"], verdicts
                )
            if drawn:
                self._draws.run(step, count, own, verdicts)
            self._verdicts_host.copy_(self._verdicts, non_blocking=True)

        size = (count, sequences, bucket(queries, POWERS))
        self._execute(("judge", *size, compared, drawn > 0), run)
        self._wait()
        found = self._verdicts_host[: len(spans)].tolist()
        return [(accepted, token) for accepted, token in found]

    def propose(
        self, spans: Sequence[Span], decodings: Sequence[Decoding], ks: Sequence[int]
    ) -> list[list[int]]:
        """Per sequence its ``k`` next tokens; every k is 1 or more."""
        rows, queries = self._bring(spans)
        host, begin, steps = self._inputs.host, 0, max(ks)
        host["active"][:] = 0
        for s, (span, d, k) in enumerate(zip(spans, decodings, ks, strict=True)):
            begin += len(span.tokens)
            host["picks"][s] = begin - 1
            host["temperatures"][s] = d.temperature
            host["seeds"][s] = signed(d.seed)
            host["noise_positions"][s] = span.end
            host["active"][:k, s] = 1
        count = len(spans)
        sequences = bucket(count, POWERS)
        host["picks"][count:sequences] = 0
        host["temperatures"][count:sequences] = 0
        host["noise_positions"][count:sequences] = 0
        size = (bucket(rows, ROW_SIZES), sequences, bucket(queries, POWERS))
        step, own = self._step, self._inputs.device
        picks = None if rows == count else own["picks"]

        def run() -> None:
            self._inputs.upload()
            draft(step, own, size, picks, self._iota, self._chosen, steps)
            self._chosen_host[:steps].copy_(self._chosen[:steps], non_blocking=True)

        self._execute(("propose", *size, steps, picks is None), run)
        self._wait()
        found = self._chosen_host[:steps, :count].T.tolist()
        return [tokens[:k] for tokens, k in zip(found, ks, strict=True)]

    # -- parts -------------------------------------------------------------------------------

    def _bring(self, spans: Sequence[Span]) -> tuple[int, int]:
        """Writes where the rows stand; returns (rows, most rows of one sequence)."""
        if self._pending:
            # The copy of the step before may still read the buffer.
            self._wait()
        host, row, longest = self._inputs.host, 0, 0
        host["row_counts"][:] = 0
        for s, span in enumerate(spans):
            count = len(span.tokens)
            host["tokens"][row : row + count] = span.tokens
            place(host, s, span.extent)
            host["first_rows"][s] = row
            host["row_counts"][s] = count
            host["positions"][s] = span.start
            row, longest = row + count, max(longest, count)
        host["tokens"][row:] = 0
        return row, longest

    def _execute(self, key: tuple[object, ...], run: Callable[[], None]) -> None:
        self._pending = True
        self._graphs.run(key, run)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self._pending = False
