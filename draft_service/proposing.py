"""What every draft's engine makes of an item, with a model or without."""

from __future__ import annotations

from outrider.shared.core.types import Proposal, ProposeItem
from outrider.shared.rounds.grants import next_k
from outrider.shared.rounds.session import Engine


class ProposingEngine(Engine[ProposeItem, Proposal]):
    """Takes in what was committed and proposes tokens."""

    def reject(self, item: ProposeItem) -> str | None:
        """See ``Engine.reject``."""
        if not 0 <= item.k <= self.max_k:
            return f"k: got {item.k}; must be in 0..{self.max_k}"
        if item.k > 0 and not item.append:
            return "append is empty: the pending token is needed to propose"
        return None

    def rows_of(self, item: ProposeItem) -> int:
        """See ``Engine.rows_of``."""
        return len(item.append) + max(self._clipped(item) - 1, 0)

    def _clipped(self, item: ProposeItem) -> int:
        """Most tokens to propose: none is placed beyond the longest sequence.

        The base's own token after them needs no place.
        """
        committed = item.base_len + len(item.append)
        return next_k(item.k, self.runner.places(committed) + 1, committed)
