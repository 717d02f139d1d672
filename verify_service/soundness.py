"""What of a proposal can be judged.

A draft may be of another version, padded to another width, or broken; what it says is never a
reason to end a request. Its proposal is taken up to the first token that can't be judged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from outrider.shared.core.types import SparseRow


def sound_tokens(
    proposal: Sequence[int], rows: Sequence[SparseRow], vocab_size: int, most: int
) -> tuple[int, str]:
    """How many leading tokens of a proposal can be judged, and why it is not more.

    ``rows``: the draft's distributions, one for each token or none; ``vocab_size``: of the base;
    ``most``: tokens that there is room for.
    """
    if rows and len(rows) != len(proposal):
        return 0, f"rows: got {len(rows)}; must be none or one for each of {len(proposal)} tokens"
    for at, token in enumerate(proposal):
        if at == most:
            return at, f"there is room for {most} tokens"
        if not 0 <= token < vocab_size:
            return at, f"token ids must be in [0, {vocab_size})"
        wrong = _wrong(rows[at], token, vocab_size) if rows else ""
        if wrong:
            return at, f"rows: {wrong}"
    return len(proposal), ""


def _wrong(row: SparseRow, token: int, vocab_size: int) -> str:
    """What is wrong with the distribution that ``token`` was drawn from."""
    if len(row.ids) != len(row.probabilities):
        return "each id goes with one probability"
    offered = dict(zip(row.ids, row.probabilities, strict=True))
    if len(offered) != len(row.ids):
        return "ids must be distinct"
    if any(not 0 <= i < vocab_size for i in row.ids):
        return f"ids must be in [0, {vocab_size})"
    if any(not 0 <= p <= 1.001 for p in row.probabilities):
        return "probabilities must be in [0, 1]"
    if not math.isclose(math.fsum(row.probabilities), 1.0, abs_tol=1e-3):
        return "probabilities must sum to 1"
    if offered.get(token, 0.0) <= 0:
        return f"token {token} was proposed with probability 0"
    return ""
