"""What a model service counts of its rounds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from outrider.protos import speculation_pb2 as pb
from outrider.shared.core.types import RoundResult
from outrider.shared.rounds.telemetry import ServiceTelemetry
from outrider.shared.telemetry.metrics import Tally


def test_service_telemetry_counts_the_tokens_that_were_cut() -> None:
    made: dict[str, Any] = {}
    instruments = SimpleNamespace(
        histogram=lambda name: SimpleNamespace(record=lambda value: None),
        counter=lambda name: made.setdefault(name, Tally(())),
        observe=lambda name, read: None,
    )
    telemetry: Any = SimpleNamespace(
        spans=None, metering=True, tracing=False, instruments=instruments
    )
    seen = ServiceTelemetry(telemetry, "verify", lambda: None)  # type: ignore[arg-type,return-value]
    for cut in (0, 2, 3):
        seen.round(pb.VerifyRequest(), [], RoundResult(cut=cut), 1.0, 2.0)
    assert list(made["outrider.service.tokens.cut"].read()) == [(5, {})]
