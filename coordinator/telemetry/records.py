"""What the coordinator tells its observer: a record of each round, request, and lost connection.

Records are made from numbers that the round has at hand and are handed over while the next
round is already on its way, so whoever consumes them (traces, metrics, the profile) adds
nothing to the critical path. All times are wall-clock nanoseconds since the epoch, taken from
one monotonic source, so that they can be subtracted as well as shown. 0 means "did not happen".
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from outrider.shared.core.links import MESSAGES
from outrider.shared.core.types import Decoding

if TYPE_CHECKING:
    from outrider.protos import speculation_pb2 as pb


class WallClock:
    """Monotonic time expressed as wall-clock nanoseconds: the offset is taken once."""

    __slots__ = ("_offset",)

    def __init__(self) -> None:
        self._offset = time.time_ns() - time.perf_counter_ns()

    def __call__(self) -> int:
        """Nanoseconds since the epoch; never runs backwards."""
        return self._offset + time.perf_counter_ns()

    def at(self, perf_counter_ns: int) -> int:
        """The same for a moment that any process of this host took by ``perf_counter_ns``."""
        return self._offset + perf_counter_ns


@dataclass(frozen=True, slots=True)
class ServiceTiming:
    """One exchange with a service: when it was on the wire, and the service's own figures."""

    sent_ns: int = 0
    answered_ns: int = 0
    model_seconds: float = 0.0
    service_seconds: float = 0.0
    rows: int = 0

    @classmethod
    def told(cls, sent_ns: int, answered_ns: int, service: pb.Timing) -> ServiceTiming:
        """With the figures that the service's answer gives."""
        return cls(
            sent_ns, answered_ns, service.model_seconds, service.service_seconds, service.rows
        )

    @property
    def seconds(self) -> float:
        """Seconds from sending to the answer, as the coordinator saw them."""
        return (self.answered_ns - self.sent_ns) / 1e9


NOT_ASKED = ServiceTiming()


@dataclass(frozen=True, slots=True)
class SequenceRound:
    """What one round did for one sequence."""

    request_id: str
    sample_index: int
    sequence_id: int
    committed_len: int
    """Length of the log before the round."""
    k: int
    """Draft tokens asked for."""
    proposed: int
    """Draft tokens verified."""
    accepted: int
    emitted: int
    """Tokens appended to the log; 0 for a prefill chunk or a refusal."""
    rows: int
    """Rows the verifier forwarded for it."""
    rollback: int
    """Verified rows whose KV was given up: ``proposed - accepted``."""
    verify_epoch: int
    draft_epoch: int
    refused: int = 0
    """An ``errors.RefusalCode``, or 0."""


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One round, end to end."""

    round: int
    traceparent: str
    started_ns: int
    finished_ns: int
    """When the verdicts were in the logs."""
    draft: ServiceTiming
    verify: ServiceTiming
    sequences: tuple[SequenceRound, ...]
    waiting: int
    """Sequences waiting for admission."""
    link: str = MESSAGES
    """How the round's proposals and verdicts travelled."""
    lost: str = ""
    """Name of the service that was lost during the round."""
    k_reason: str = ""
    """Why the server chose its Ks; empty where every K was the client's own."""
    foreseen_rate: float = 0.0
    """Tokens a second of all sequences that these Ks promised."""
    foreseen_plain_rate: float = 0.0
    """The same without a draft."""

    @property
    def overhead_seconds(self) -> float:
        """Round time less the two services' model time."""
        spent = (self.finished_ns - self.started_ns) / 1e9
        return spent - self.draft.model_seconds - self.verify.model_seconds


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One sample of one request, from arrival to end."""

    request_id: str
    sample_index: int
    sequence_id: int
    traceparent: str
    """What the client sent; empty when it sent none."""
    arrived_ns: int
    admitted_ns: int
    first_token_ns: int
    finished_ns: int
    prompt_tokens: int
    cached_prompt_tokens: int
    """Of them, those that the base took over from another sequence."""
    completion_tokens: int
    reason: str
    """Name of the finish reason, or of the error's gRPC status."""
    error: str
    k: int | None
    """Fixed K; None where it was adaptive."""
    rule: str
    temperature: float
    rounds: int
    proposed_by_position: tuple[int, ...]
    accepted_by_position: tuple[int, ...]
    decoding: Decoding
    max_new_tokens: int
    num_samples: int
    """Samples of the request: as many records like this one."""


@dataclass(frozen=True, slots=True)
class ConnectionRecord:
    """A connection to a service came up or went away."""

    service: str
    """"draft" or "verify"."""
    up: bool
    at_ns: int
    reason: str
    sequences: int = 0
    """Sequences that have to be opened anew."""


class Observer(Protocol):
    """Consumes records. Must not block, and must not raise."""

    enabled: bool
    """False: no record of a round is built at all."""
    follows: bool
    """False: requests and connections are not told either."""

    def attach(self, runtime: Any) -> None:
        """The coordinator is up; ``runtime`` is the ``Runtime``."""

    def traceparent(self, round_number: int, request_ids: Sequence[str]) -> str:
        """W3C trace context that the messages of this round carry; empty when not traced."""

    def follow(self, round_number: int, request_ids: Sequence[str], traceparent: str) -> None:
        """A round without messages is in this trace context, which follows from its grant's."""

    def request_started(self, request_id: str, traceparent: str) -> None:
        """A request passed validation; ``traceparent`` is the client's."""

    def round(self, record: RoundRecord) -> None:
        """A round is over."""

    def request(self, record: RequestRecord) -> None:
        """A sample is over."""

    def connection(self, record: ConnectionRecord) -> None:
        """A connection changed."""


class NoObserver:
    """Observes nothing, at no cost."""

    enabled = False
    follows = False

    def attach(self, runtime: Any) -> None:
        """Ignored."""

    def traceparent(self, round_number: int, request_ids: Sequence[str]) -> str:
        """Not traced."""
        return ""

    def follow(self, round_number: int, request_ids: Sequence[str], traceparent: str) -> None:
        """Not traced."""

    def request_started(self, request_id: str, traceparent: str) -> None:
        """Ignored."""

    def round(self, record: RoundRecord) -> None:
        """Ignored."""

    def request(self, record: RequestRecord) -> None:
        """Ignored."""

    def connection(self, record: ConnectionRecord) -> None:
        """Ignored."""
