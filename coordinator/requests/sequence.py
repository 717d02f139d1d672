"""One sequence: its token log, which is the truth, and what each service holds of it.

``n = len(log)`` is ``committed_len``. A service that lost the sequence gets it again from the
log; nothing that a service holds is ever needed to go on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from outrider.coordinator.requests.acceptance_rate import Acceptance
from outrider.coordinator.requests.statistics import Statistics
from outrider.coordinator.requests.text.output import Output
from outrider.coordinator.requests.validation import GenerationRequest
from outrider.shared.core.types import Decoding, OpenSequence


@dataclass(slots=True)
class ServiceState:
    """What one service holds of one sequence."""

    open: bool = False
    reserved: bool = False
    """It was opened on this stream and not closed: an extent may be held there for it, whatever
    the service answered since."""
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
        """The service does not know the sequence, or is to begin anew."""
        self.open = False
        self.length = 0

    def release(self) -> bool:
        """It is to be closed there, or the stream is gone; whether anything may be held."""
        self.lose()
        reserved, self.reserved = self.reserved, False
        return reserved


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
    draft: ServiceState = field(default_factory=ServiceState)
    verify: ServiceState = field(default_factory=ServiceState)
    parent: Sequence | None = None
    """The sample that takes in the prompt for this one too."""
    children: list[Sequence] = field(default_factory=list)
    by_host: bool = False
    """The devices can't take its turns by themselves."""

    def __post_init__(self) -> None:
        self.log = [*self.request.prompt_ids, *self.request.resume_ids]
        # The last token of the prompt is each sample's own pending token. A prompt of one token
        # leaves nothing to share.
        if self.prefix_len == 0:
            self.parent = None
        if self.parent is not None:
            self.parent.children.append(self)

    @property
    def prefix_len(self) -> int:
        """Tokens whose KV is the same for all samples of the request."""
        return len(self.request.prompt_ids) - 1

    @property
    def ready(self) -> bool:
        """Whether it may run: not while another sample takes in the prompt for it."""
        return self.may_open(self.verify)

    @property
    def shares(self) -> bool:
        """Whether others wait for its prompt, which is to be taken in before it decodes.

        So all samples begin in the same round, and none can end before the others share.
        """
        return any(not child.verify.open and child.output.finish is None for child in self.children)

    def may_open(self, state: ServiceState) -> bool:
        """Whether the service of ``state`` has it, or what it shares, or there is none to share."""
        donor = self._donor(state)
        return state.open or donor is None or donor.length >= self.prefix_len

    @property
    def capacity(self) -> int:
        """Token slots that it reserves on each service."""
        return self.request.capacity

    @property
    def missing(self) -> int:
        """Rows that the verifier must take in, the pending token included; >= 1."""
        return len(self.log) - self.base_len(self.verify)

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
        return self.decoding.rule.needs_rows

    @property
    def replays_rounds(self) -> bool:
        """Whether its tokens depend on which rounds have a proposal, and K is to settle that."""
        return self.needs_rows and bool(self.request.k)

    def base_len(self, state: ServiceState) -> int:
        """Where the next message to the service of ``state`` begins, in tokens of the log.

        The pending token is always sent.
        """
        return min(self._known(state), len(self.log) - 1)

    def _known(self, state: ServiceState) -> int:
        """Tokens whose KV the service has, or will have when the sequence is opened."""
        return state.length if state.open else self._inherited(state)

    def _inherited(self, state: ServiceState) -> int:
        """Tokens whose KV there is for it before it is opened: the parent's prompt, or none."""
        donor = self._donor(state)
        return self.prefix_len if donor is not None and donor.length >= self.prefix_len else 0

    def opening(self, state: ServiceState) -> OpenSequence:
        """The message that opens it on the service of ``state``, under a new epoch.

        With the prompt's KV of the sample that shares it, where that is there.
        """
        state.epoch += 1
        state.open = state.reserved = True
        state.length = self._inherited(state)
        return OpenSequence(
            self.sequence_id,
            state.epoch,
            self.capacity,
            self.decoding,
            self.parent.sequence_id if self.parent is not None and state.length else None,
            state.length,
        )

    def _donor(self, state: ServiceState) -> ServiceState | None:
        """What the service of ``state`` holds of the parent, if the parent still runs there."""
        parent = self.parent
        if parent is None or parent.output.finish is not None:
            return None
        donor = parent.verify if state is self.verify else parent.draft
        return None if donor.blocked or donor.given_up else donor
