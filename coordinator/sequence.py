"""One sequence: its token log, which is the truth, and what each service holds of it.

``n = len(log)`` is ``committed_len``. A service that lost the sequence gets it again from the
log; nothing that a service holds is ever needed to go on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from outrider.coordinator.output import Output
from outrider.coordinator.requests import GenerationRequest
from outrider.coordinator.speculation import Acceptance
from outrider.coordinator.statistics import Statistics
from outrider.shared.types import Decoding, OpenSequence, Rule


@dataclass(slots=True)
class Held:
    """What one service holds of one sequence."""

    open: bool = False
    epoch: int = 0
    length: int = 0
    """Tokens of the log whose KV is valid there."""
    blocked: bool = False
    """An open was refused for want of room; not asked again until room was made."""
    given_up: bool = False
    """The service can't serve this sequence at all."""
    strikes: int = 0
    """Refusals in a row."""
    full_since: float | None = None
    """When room was first refused to a sequence that had it before; monotonic seconds."""

    def lose(self) -> None:
        """The service no longer has the sequence, or is to begin anew."""
        self.open = False
        self.length = 0

    def base_len(self, committed_len: int) -> int:
        """Where the next message begins; the pending token is always sent."""
        return min(self.length, committed_len - 1)


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample of one request, from admission to end."""

    sequence_id: int
    request: GenerationRequest
    sample_index: int
    decoding: Decoding
    output: Output
    acceptance: Acceptance
    statistics: Statistics
    log: list[int] = field(default_factory=list)
    draft: Held = field(default_factory=Held)
    verify: Held = field(default_factory=Held)

    def __post_init__(self) -> None:
        self.log = [*self.request.prompt_ids, *self.request.resume_ids]

    @property
    def capacity(self) -> int:
        """Token slots that it reserves on each service."""
        return self.request.capacity

    @property
    def missing(self) -> int:
        """Rows that the verifier must take in, the pending token included; >= 1."""
        return len(self.log) - self.verify.base_len(len(self.log))

    @property
    def started(self) -> bool:
        """Whether the base has written a token."""
        return len(self.log) > len(self.request.prompt_ids) + len(self.request.resume_ids)

    @property
    def max_k(self) -> int:
        """Most draft tokens worth verifying: the base writes one token of its own each round."""
        return self.output.left - 1

    @property
    def needs_rows(self) -> bool:
        """Whether its rule needs the draft's distributions beside the proposed tokens."""
        return self.decoding.rule is Rule.REJECTION

    def opening(self, held: Held) -> OpenSequence:
        """The message that opens it on the service of ``held``, under a new epoch."""
        held.epoch += 1
        held.open = True
        held.length = 0
        return OpenSequence(self.sequence_id, held.epoch, self.capacity, self.decoding)
