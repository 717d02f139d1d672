"""The physical ceiling of a decode step: every weight is read from memory once.

W is weight bytes, T = W / bandwidth, E(K) = (1 - a^(K+1)) / (1 - a) the tokens a round emits
at acceptance probability a (Leviathan et al. 2023, eq. 1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from outrider.protos.generation_pb2 import ServiceProfile
    from outrider.protos.speculation_pb2 import ServiceInfoResponse

    Service = ServiceInfoResponse | ServiceProfile


def expected_tokens(acceptance: float, k: int) -> float:
    """Tokens emitted per round, 1 <= result <= k + 1."""
    if acceptance >= 1.0:
        return k + 1.0
    return (1.0 - acceptance ** (k + 1)) / (1.0 - acceptance)


def shared_device(
    base_bytes: float, draft_bytes: float, bandwidth: float, tokens_per_round: float, k: float
) -> float:
    """Tokens per second when draft and base take turns on one memory; bytes, bytes/s."""
    return tokens_per_round * bandwidth / (base_bytes + k * draft_bytes)


def rate_ceiling(base: Service, draft: Service | None, tokens: float, k: float) -> float | None:
    """Tokens per second that memory allows at ``tokens`` and mean ``k`` per round.

    None where the memory's speed is unknown, and for a model without weights.
    """
    speed, weights = base.memory_bandwidth, base.model.weight_bytes
    if not speed or not weights:
        return None
    if draft is None or not k:
        return shared_device(weights, 0, speed, tokens, 0)
    more = draft.model.weight_bytes
    if draft.model.device == base.model.device or not draft.memory_bandwidth:
        return shared_device(weights, more, speed, tokens, k)
    # Two devices: drafting can hide behind verifying, and the slower of the two decides.
    return tokens / max(weights / speed, k * more / draft.memory_bandwidth)
