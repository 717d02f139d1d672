"""``greedy`` and ``coupled``: a proposed token stands iff it *equals* the base's own choice there.

So the output is the base's own whatever was proposed. The two differ in how the base chooses,
which ``choose`` knows from the temperature.
"""

from __future__ import annotations

from collections.abc import Sequence

from outrider.shared.sampling.choose import choose
from outrider.verify_service.acceptance import JudgeBatch


def judge(batch: JudgeBatch, mine: Sequence[int]) -> list[tuple[int, int]]:
    """See ``acceptance.Judge``."""
    targets = choose(batch.processed, batch.contexts)
    verdicts = []
    for i in mine:
        first, proposal = batch.first[i], batch.items[i].proposal
        accepted = accepted_prefix(targets[first : first + len(proposal)], proposal)
        verdicts.append((accepted, targets[first + accepted]))
    return verdicts


def accepted_prefix(targets: Sequence[int], proposal: Sequence[int]) -> int:
    """How many proposed tokens equal the base's own choices."""
    for i, token in enumerate(proposal):
        if token != targets[i]:
            return i
    return len(proposal)
