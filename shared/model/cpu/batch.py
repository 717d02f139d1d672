"""The table of a batch: its rows, where their KV goes, and what each of them reads."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from torch import Tensor

from outrider.kernels.cpu.tables import BatchWords, PoolWords
from outrider.shared.kv.arena import Arena
from outrider.shared.model.runner import Span


class BatchTable:
    """``words`` is what the kernels are given; what it points at lives as long as it does."""

    def __init__(self, arena: Arena, spans: Sequence[Span]) -> None:
        """All rows of ``spans`` in one pass."""
        tokens: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        segments = [0]  # so that an index of 0 is no segment's
        pools = [([], [], [], []) for _ in arena.pools]  # type: list[tuple[list[int], ...]]
        for span in spans:
            rows = len(span.tokens)
            start, end = span.start, span.start + rows
            tokens.extend(span.tokens)
            positions.extend(range(start, end))
            wanted.extend(range(len(tokens) - span.wanted, len(tokens)))
            for number, (slots, lows, starts, places) in enumerate(pools):
                first = arena.first_read(number, start)
                places.extend([len(segments)] * rows)
                starts.extend([first] * rows)
                for part in arena.segments(span.extent, number, first, end):
                    segments += (part.slot, part.count)
                for part in arena.segments(span.extent, number, start, end):
                    slots.extend(range(part.slot, part.slot + part.count))
                window = arena.pools[number].window
                if window is None:
                    lows.extend([0] * rows)
                else:
                    lows.extend([max(0, place - window + 1) for place in range(start, end)])
        self.rows, self.wanted = len(tokens), len(wanted)
        self._held: list[array[int]] = []
        self.words = array("q", [0] * len(BatchWords))
        self.words[BatchWords.ROWS], self.words[BatchWords.WANTED] = self.rows, self.wanted
        self.words[BatchWords.TOKENS] = self._hold(array("q", tokens))
        self.words[BatchWords.POSITIONS] = self._hold(array("q", positions))
        self.words[BatchWords.WANTED_ROWS] = self._hold(array("q", wanted))
        begin = self._hold(array("q", segments))
        for slots, lows, starts, places in pools:
            record = {
                PoolWords.SLOTS: slots,
                PoolWords.LOWS: lows,
                PoolWords.STARTS: starts,
                PoolWords.SEGMENTS: [begin + 8 * place for place in places],
            }
            self.words.extend(self._hold(array("q", record[place])) for place in PoolWords)

    def _hold(self, numbers: array[int]) -> int:
        self._held.append(numbers)
        return numbers.buffer_info()[0]

    def choose(self) -> array[int]:
        """Has the likeliest token of each wanted row written to what is returned; -1 where the
        row's largest logit is not a finite number."""
        chosen = array("q", bytes(8 * self.wanted))
        self.words[BatchWords.CHOSEN] = self._hold(chosen)
        return chosen

    def follow(self, chosen: array[int]) -> None:
        """Its rows' tokens are the first of what another batch has ``chosen`` by then."""
        self.words[BatchWords.TOKENS] = self._hold(chosen)

    def write_to(self, logits: Tensor) -> None:
        """``logits``: float32 ``[wanted, whole panels of the vocabulary]``, contiguous."""
        self._logits = logits
        self.words[BatchWords.LOGITS] = logits.data_ptr()
