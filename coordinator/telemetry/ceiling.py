"""The physical ceiling of a decode step: every weight is read from memory once.

W is weight bytes, T = W / bandwidth, E(K) = (1 - a^(K+1)) / (1 - a) the tokens a round emits
at acceptance probability a (Leviathan et al. 2023, eq. 1).
"""

from __future__ import annotations


def expected_tokens(acceptance: float, k: int) -> float:
    """Tokens emitted per round, 1 <= result <= k + 1."""
    if acceptance >= 1.0:
        return k + 1.0
    return (1.0 - acceptance ** (k + 1)) / (1.0 - acceptance)


def shared_device(
    base_bytes: float, draft_bytes: float, bandwidth: float, tokens_per_round: float, k: int
) -> float:
    """Tokens per second when draft and base take turns on one memory; bytes, bytes/s."""
    return tokens_per_round * bandwidth / (base_bytes + k * draft_bytes)
