"""The physical ceiling, against figures worked out by hand."""

from __future__ import annotations

import pytest

from outrider.coordinator.telemetry.ceiling import rate_ceiling
from outrider.protos.generation_pb2 import ModelDescription, ServiceProfile
from outrider.protos.speculation_pb2 import ServiceInfoResponse

Service = ServiceInfoResponse | ServiceProfile
Kind = type[ServiceInfoResponse] | type[ServiceProfile]
KINDS = pytest.mark.parametrize("kind", [ServiceInfoResponse, ServiceProfile])


def made(kind: Kind, weights: int, speed: float, device: str) -> Service:
    model = ModelDescription(weight_bytes=weights, device=device)
    return kind(model=model, memory_bandwidth=speed)


@KINDS
@pytest.mark.parametrize(
    ("draft", "tokens", "k", "wanted"),
    [
        # By hand: T_v = 0.1 s, T_d = 0.01 s.
        (None, 1.0, 0.0, 10.0),
        ((1, 100, "cpu"), 3.0, 4.0, 3 / (0.1 + 0.04)),
        ((1, 100, "cuda:1"), 3.0, 4.0, 3 / 0.1),
        ((1, 10, "cuda:1"), 3.0, 4.0, 3 / 0.4),
    ],
)
def test_ceiling_by_hand(
    kind: Kind, draft: tuple[int, float, str] | None, tokens: float, k: float, wanted: float
) -> None:
    second = None if draft is None else made(kind, *draft)
    assert rate_ceiling(made(kind, 10, 100, "cpu"), second, tokens, k) == pytest.approx(wanted)


@KINDS
def test_ceiling_is_unknown_without_the_memorys_speed(kind: Kind) -> None:
    assert rate_ceiling(made(kind, 10, 0, "cpu"), None, 1.0, 0.0) is None
