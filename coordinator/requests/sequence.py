"""One sequence: its token log, which is the truth, and what each service holds of it.

``n = len(log)`` is ``committed_len``. A service that lost the sequence gets it again from the
log; nothing that a service holds is ever needed to go on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from outrider.coordinator.requests.acceptance_rate import Acceptance
from outrider.coordinator.requests.prefix_cache import TokenBlocks
from outrider.coordinator.requests.service_state import ServiceState
from outrider.coordinator.requests.statistics import Statistics
from outrider.coordinator.requests.text.output import Output
from outrider.coordinator.requests.validation import GenerationRequest
from outrider.shared.core.types import Decoding, OpenSequence

NEVER = 1 << 30
"""A K that no request has."""


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
    host_k: int = NEVER
    """The least K with which the devices were found unable to take its turns by themselves."""
    blocks: TokenBlocks = field(init=False)
    """The log, as prompts that begin like it are found."""

    def __post_init__(self) -> None:
        self.log = [*self.request.prompt_ids, *self.request.resume_ids]
        self.blocks = TokenBlocks(self.request.cache_salt, self.log)
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
        return state.length if state.open else self._inheritance(state)[1]

    def _inheritance(self, state: ServiceState) -> tuple[int | None, int]:
        """What KV there is for it before it is opened: of whom, and tokens. The prompt of the
        sample that shares it, or what a sequence begins with that begins alike, or nothing."""
        donor = self._donor(state)
        if donor is not None:
            assert self.parent is not None
            whole = donor.length >= self.prefix_len
            return (self.parent.sequence_id, self.prefix_len) if whole else (None, 0)
        match = state.match(self.blocks, len(self.log) - 1)
        return (None, 0) if match is None else (match.sequence_id, match.length)

    def opening(self, state: ServiceState) -> OpenSequence:
        """The message that opens it on the service of ``state``, under a new epoch.

        With the KV that there is for it: the prompt's of the sample that shares it, or a copy of
        that of another sequence.
        """
        shared = self._donor(state) is not None
        origin, inherited = self._inheritance(state)
        state.epoch += 1
        state.open = state.reserved = True
        state.length = state.inherited = inherited
        state.branch = shared and inherited > 0
        if not state.branch:
            state.cache.offer(self.sequence_id, self.blocks, state)
        return OpenSequence(
            self.sequence_id,
            state.epoch,
            self.capacity,
            self.decoding,
            origin,
            inherited,
            copy=inherited > 0 and not shared,
        )

    def leave(self, state: ServiceState, *, cache: bool) -> bool:
        """It is over at the service of ``state``, which is told with the next message; whether
        anything may be held there.

        ``cache``: whether that may stay, for others to begin with.
        """
        length = min(state.length, len(self.log)) if cache and not state.branch else 0
        held = state.release()
        if held:
            state.cache.retire(self.sequence_id, self.blocks, length)
        return held

    def confirm(self, state: ServiceState) -> None:
        """The service of ``state`` has served it: it had what the sequence was opened with."""
        if state.inherited:
            state.cache.hit(state.inherited)
            if state is self.verify:
                prompt = len(self.request.prompt_ids)
                self.statistics.cached_prompt_tokens = min(state.inherited, prompt)
            state.inherited = 0

    def _donor(self, state: ServiceState) -> ServiceState | None:
        """What the service of ``state`` holds of the parent, if the parent still runs there."""
        parent = self.parent
        if parent is None or parent.output.finish is not None:
            return None
        donor = parent.verify if state is self.verify else parent.draft
        return None if donor.blocked or donor.given_up else donor
