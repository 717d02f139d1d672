"""The draft's engine: take in what was committed, then propose K tokens one by one."""

from __future__ import annotations

from collections.abc import Sequence

from outrider.shared.errors import RefusalCode
from outrider.shared.runner import Span
from outrider.shared.sampling import RowContext, propose
from outrider.shared.sequences import Engine, Held, finite_rows, refusal, spans_of
from outrider.shared.types import Proposal, ProposeItem, Refusal, SparseRow


class DraftEngine(Engine[ProposeItem, Proposal]):
    """Proposes tokens.

    The first forward takes ``append`` in (after full acceptance that is the last proposed token
    and the bonus token: two rows, not two forwards) and gives the first proposed token; each
    further forward takes in one proposed token. The last one's KV is not written, so
    afterwards ``valid_len = committed_len + K - 1``.
    """

    def reject(self, item: ProposeItem) -> str | None:
        """See ``Engine.reject``."""
        if not 0 <= item.k <= self.max_k:
            return f"k: got {item.k}; must be in 0..{self.max_k}"
        if item.k > 0 and not item.append:
            return "append is empty: the pending token is needed to propose"
        return None

    def rows_of(self, item: ProposeItem) -> int:
        """See ``Engine.rows_of``."""
        return len(item.append) + max(item.k - 1, 0)

    def run(self, work: Sequence[tuple[ProposeItem, Held]]) -> tuple[list[Proposal | Refusal], int]:
        """See ``Engine.run``."""
        counts = [min(item.k, 1) for item, _ in work]
        spans = spans_of(work, [item.append for item, _ in work], counts)
        rows = sum(len(span.tokens) for span in spans)
        chosen: list[list[int]] = [[] for _ in work]
        weights: list[list[SparseRow]] = [[] for _ in work]
        failed: set[int] = set()
        # The log grows by the proposed tokens, which the choice of the next one looks at; the
        # next item's base_len cuts them off again.
        active = [i for i, (item, _) in enumerate(work) if item.k > 0]
        while spans:
            logits = self.runner.forward(spans)
            if active:
                contexts = [RowContext(work[i][1].decoding, work[i][1].log) for i in active]
                finite = finite_rows(logits)
                tokens, row_weights = propose(logits, contexts)
                for i, fine, token, weight in zip(active, finite, tokens, row_weights, strict=True):
                    if not fine:
                        failed.add(i)
                        continue
                    chosen[i].append(token)
                    work[i][1].log.append(token)
                    if weight is not None:
                        weights[i].append(weight)
            active = [i for i in active if i not in failed and len(chosen[i]) < work[i][0].k]
            spans = [
                Span(work[i][1].extent, work[i][1].extent.valid_len, chosen[i][-1:], 1)
                for i in active
            ]
            rows += len(spans)
        return [
            refusal(item, RefusalCode.MODEL, "the model's logits are not finite")
            if i in failed
            else Proposal(
                item.sequence_id,
                item.epoch,
                item.base_len + len(item.append),
                tuple(chosen[i]),
                tuple(weights[i]),
            )
            for i, (item, _) in enumerate(work)
        ], rows
