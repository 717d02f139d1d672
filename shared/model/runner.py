"""One ragged forward over the arena: the interface that the engines call.

A batch is a list of spans, one per sequence. The rows of all spans are concatenated in one
packed row dimension: no padding, no gather of KV. Which implementation runs is decided where
the model is loaded (``loading``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outrider.shared.core.model_facts import ModelFacts
from outrider.shared.core.types import Decoding, SparseRow
from outrider.shared.kv.arena import Arena, Extent

if TYPE_CHECKING:  # an engine without a model starts without torch
    from torch import Tensor

    from outrider.shared.kv.storage import Storage

NEVER = 1 << 62
"""A position that no row has."""


@dataclass(slots=True)
class Span:
    """Rows of one sequence: ``tokens`` at positions ``start …`` of ``extent``.

    The logits of the last ``wanted`` rows are returned. ``long_from``: the position from which on
    rows count as those of a long sequence; see ``RotarySwitch``.
    """

    extent: Extent
    start: int
    tokens: Sequence[int]
    wanted: int
    long_from: int = NEVER

    @property
    def end(self) -> int:
        """The position behind its last row."""
        return self.start + len(self.tokens)

    def part(self, begin: int, end: int) -> Span:
        """Its rows ``begin … end-1``; the wanted ones among them, which are the span's last."""
        tokens = self.tokens[begin:end]
        wanted = max(0, min(len(tokens), self.wanted - (len(self.tokens) - end)))
        return Span(self.extent, self.start + begin, tokens, wanted, self.long_from)


@dataclass(frozen=True, slots=True)
class RotarySwitch:
    """A rotary embedding that changes its factors where a sequence becomes longer than ``border``.

    ``anew``: the whole sequence is then taken in anew under the long factors, as transformers'
    ``generate`` does for some models; for the others, what was cached stays as it is.
    """

    border: int
    anew: bool

    def long_from(self, prompt_len: int) -> int:
        """From where on the rows of a sequence are long when it begins."""
        if prompt_len > self.border:
            return 0
        return NEVER if self.anew else self.border


class Runner(ABC):
    """A model with its arena."""

    switch: RotarySwitch | None = None
    """Where the rotary embedding depends on the length of the sequence."""

    pass_rows: int | None = None
    """Most rows of a pass, but that all rows whose logits are wanted go in one; None: no limit
    but what the implementation sees to by itself."""

    slow_calls = 1
    """First calls of a size that take longer than those that follow."""

    def __init__(self, facts: ModelFacts, storage: Storage) -> None:
        """``storage`` holds the KV of every layer of the model."""
        self.facts = facts
        self.storage = storage

    def places(self, log_len: int) -> int:
        """Positions that rows may take while the log has ``log_len`` tokens."""
        switch = self.switch
        if switch is not None and switch.anew and log_len <= switch.border:
            return min(switch.border, self.facts.max_positions)
        return self.facts.max_positions

    @property
    def arena(self) -> Arena:
        """The bookkeeping of the KV memory."""
        return self.storage.arena

    def forward(self, spans: Sequence[Span]) -> Tensor:
        """Forwards all rows in one pass; returns logits ``[sum(wanted), vocab]``.

        Writes the rows' KV and advances each extent's valid length to ``start + len(tokens)``.
        Spans longer than the rings allow, and more rows than ``pass_rows``, are taken in several
        passes. Raises ``ValueError`` where a span starts elsewhere than at its extent's valid
        length or ends beyond its capacity; then nothing was written.
        """
        self.check(spans)
        while any(counts := self._ahead(spans)):
            spans = self._take_in(spans, counts)
        with self._writing(spans):
            return self._forward(spans)

    works_between = False
    """Whether ``between`` has ever anything to do."""

    def between(self) -> bool:
        """Does a piece of the work that is better done while nobody waits for a round; whether
        there was any."""
        return False

    def time_device(self, *, timed: bool) -> None:
        """Whether ``device_seconds`` is wanted from now on."""
        return

    def device_seconds(self) -> float | None:
        """What the device took for what it did since this was last asked, where it takes turns by
        itself; None where the host has a part in every round."""
        return None

    def finish(self) -> None:
        """Waits until the device has done what it was given."""
        import torch

        kind = self.storage.device.type
        if kind == "cuda":
            torch.cuda.current_stream(self.storage.device).synchronize()
        elif kind == "mps":
            torch.mps.synchronize()

    def written(self, spans: Sequence[Span]) -> None:
        """Takes note of rows that the device has written by itself; raises as ``forward``."""
        self.check(spans)
        for span in spans:
            span.extent.advance(span.end)

    def check(self, spans: Sequence[Span]) -> None:
        """Raises ``ValueError`` where the rows of a span may not be written; see ``forward``."""
        limit = self.arena.max_rows
        for span in spans:
            rows = len(span.tokens)
            self.arena.check_write(
                span.extent, span.start, rows if limit is None else min(rows, limit)
            )
            if span.end > span.extent.capacity:
                raise ValueError(f"rows end at {span.end}; the capacity is {span.extent.capacity}")

    @property
    def cores(self) -> int:
        """Cores of the host that a forward keeps busy."""
        import torch

        return torch.get_num_threads() if self.storage.device.type == "cpu" else 0

    reads_branches = True
    """Whether a forward reads the KV that a branch shares with its parent where it lies."""

    @property
    def branches(self) -> bool:
        """Whether ``share`` makes branches."""
        return self.reads_branches and self.arena.max_rows is None

    def share(self, parent: Extent, prefix_len: int, capacity: int) -> Extent:
        """An extent whose first ``prefix_len`` positions are those of ``parent``, already valid.

        A branch where the parent can go on beside it; elsewhere the prefix is copied, once.
        ``capacity`` counts the prefix. Nothing is valid where neither can be done. Raises
        ``CapacityError``.
        """
        if self.branches:
            return self.arena.branch(parent, prefix_len, capacity)
        extent = self.arena.admit(capacity)
        self.copy(parent, extent, prefix_len)
        return extent

    def copy(self, parent: Extent, extent: Extent, length: int) -> None:
        """Gives ``extent`` the first ``length`` positions of ``parent``; see ``Storage.copy``."""
        self.storage.copy(parent, extent, length)

    def judge(
        self,
        spans: Sequence[Span],
        decodings: Sequence[Decoding],
        proposals: Sequence[Sequence[int]],
        rows: Sequence[Sequence[SparseRow]] | None = None,
    ) -> list[tuple[int, int]] | None:
        """Forwards and judges in one go, where the device can.

        Returns (accepted, next token) of each span with wanted rows, which are those of its
        pending token and of its proposal; the other spans are only taken in. ``rows``: per span
        the distributions that its proposal was drawn from, or none; None where no span has any.
        The next token is -1 where the logits were not finite. None where this runner can't, or
        not with these decodings: then nothing was done, and ``forward`` does it.
        """
        return None

    def propose(
        self, spans: Sequence[Span], decodings: Sequence[Decoding], ks: Sequence[int]
    ) -> list[list[int]] | None:
        """Forwards the spans and then one chosen token after the other, where the device can.

        Returns ``ks[i]`` tokens for each span (none where 0: its rows are only taken in), -1
        from the first whose logits were not finite; valid lengths end before the last token.
        None as in ``judge``.
        """
        return None

    def _ahead(self, spans: Sequence[Span]) -> list[int]:
        """Rows of each span that go in a pass of their own before the others; none, or 0 for all,
        where one pass takes them."""
        ring = self.arena.max_rows
        if ring is None and self.pass_rows is None:
            return []
        over, room = 0, sum(len(span.tokens) for span in spans)
        if self.pass_rows is not None:
            over, room = room - self.pass_rows, self.pass_rows
        counts = []
        for span in spans:
            rows = len(span.tokens)
            # The last pass stays as long as it may be, so that it holds all wanted rows.
            excess = rows - (rows if ring is None else ring)
            count = max(0, excess, min(over, rows - span.wanted))
            count = min(count, room, rows if ring is None else ring)
            counts.append(count)
            over, room = over - count, room - count
        return counts

    def _take_in(self, spans: Sequence[Span], counts: Sequence[int]) -> list[Span]:
        """Forwards the first rows of spans, so many of each; returns what is left."""
        left, heads = [], []
        for span, count in zip(spans, counts, strict=True):
            if count:
                heads.append(span.part(0, count))
            if count < len(span.tokens):
                left.append(span.part(count, len(span.tokens)))
        with self._writing(heads):
            self._forward(heads)
        return left

    @contextmanager
    def _writing(self, spans: Sequence[Span], ends: Sequence[int] | None = None) -> Iterator[None]:
        """Within, rows are written from each span's start up to ``ends``, else its own end.

        Their extents are told before; what was written is valid when it is left without an error.
        """
        ends = ends if ends is not None else [span.end for span in spans]
        for span, end in zip(spans, ends, strict=True):
            span.extent.begin(end)
        yield
        for span, end in zip(spans, ends, strict=True):
            span.extent.advance(end)

    @abstractmethod
    def _forward(self, spans: Sequence[Span]) -> Tensor:
        """One pass over checked spans; does not touch the extents' lengths."""
