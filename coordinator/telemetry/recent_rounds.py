"""The rounds of the last requests, kept in memory for whoever asks for their profile."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from outrider.coordinator.telemetry.records import RequestRecord, RoundRecord, SequenceRound

MOST_REQUESTS = 64
MOST_ROUNDS = 65536
"""Over all requests; the oldest request goes first."""


@dataclass(slots=True)
class Kept:
    """What one request's first sample went through."""

    rounds: list[tuple[RoundRecord, SequenceRound]] = field(default_factory=list)
    request: RequestRecord | None = None
    trace_id: str = ""


class RoundsKept:
    """Records by request id, of bounded size."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._rounds = 0

    def begin(self, request_id: str, trace_id: str) -> None:
        """A request starts; ``trace_id`` in hexadecimal digits."""
        self._kept[request_id] = Kept(trace_id=trace_id)
        while len(self._kept) > MOST_REQUESTS or (
            self._rounds > MOST_ROUNDS and len(self._kept) > 1
        ):
            _, gone = self._kept.popitem(last=False)
            self._rounds -= len(gone.rounds)

    def round(self, record: RoundRecord) -> None:
        """A round is over."""
        for one in record.sequences:
            kept = self._kept.get(one.request_id)
            if kept is not None and one.sample_index == 0:
                kept.rounds.append((record, one))
                self._rounds += 1

    def request(self, record: RequestRecord) -> None:
        """A sample is over."""
        kept = self._kept.get(record.request_id)
        if kept is not None and record.sample_index == 0:
            kept.request = record

    def get(self, request_id: str) -> Kept | None:
        """What is known of a request; None where it is not kept (any more)."""
        return self._kept.get(request_id)
