"""Where the time of a round went, from the timestamps that were taken anyway.

::

    started   sent        answered   sent       answered  finished
       |schedule|--- draft ---|schedule|-- verify --|accept|
                 wire   model            wire  model
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Exchange(Protocol):
    """One message to a service and its answer; 0 where it did not happen."""

    @property
    def sent_ns(self) -> int: ...
    @property
    def answered_ns(self) -> int: ...
    @property
    def model_seconds(self) -> float: ...
    @property
    def service_seconds(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Phases:
    """Seconds; ``draft + verify + wire + accept + schedule - hidden`` is the whole round."""

    draft: float
    """In the draft service, from the message's arrival to the answer."""
    verify: float
    """In the verify service, likewise."""
    wire: float
    """Messages on their way: the exchanges less the services' own time."""
    accept: float
    """From the verdicts' arrival until they were in the logs."""
    schedule: float
    """The coordinator before and between the messages."""
    hidden: float
    """Drafting that ran while the verifier worked."""
    total: float


NAMES = ("draft", "verify", "wire", "accept", "schedule")


def split(started_ns: int, finished_ns: int, draft: Exchange, verify: Exchange) -> Phases:
    """The phases of one round. Times are nanoseconds of one clock."""
    total = (finished_ns - started_ns) / 1e9
    draft_span = (draft.answered_ns - draft.sent_ns) / 1e9
    verify_span = (verify.answered_ns - verify.sent_ns) / 1e9
    # A service's clock and ours differ in rate by parts per million at most, but a figure
    # must not come out negative.
    draft_own = min(draft.service_seconds, draft_span)
    verify_own = min(verify.service_seconds, verify_span)
    overlap = min(draft.answered_ns, verify.answered_ns) - max(draft.sent_ns, verify.sent_ns)
    hidden = max(0, overlap) / 1e9 if draft.sent_ns and verify.sent_ns else 0.0
    last = max(draft.answered_ns, verify.answered_ns)
    accept = max(0.0, (finished_ns - last) / 1e9) if last else 0.0
    wire = draft_span + verify_span - draft_own - verify_own
    schedule = total - accept - (draft_span + verify_span - hidden)
    return Phases(draft_own, verify_own, wire, accept, max(0.0, schedule), hidden, total)
