"""What speculation did for one sample, and where its time went."""

from __future__ import annotations

from dataclasses import dataclass, field

from outrider.protos import generation_pb2 as pb


@dataclass(slots=True)
class Statistics:
    """Counters of one sample. Times are nanoseconds of one clock; 0 is "not yet".

    ``draft``, ``verify`` and ``overhead`` cover the rounds after the first token, so that
    queue + prefill + draft + verify + overhead add up to the total.
    """

    arrived_ns: int
    admitted_ns: int = 0
    first_token_ns: int = 0
    finished_ns: int = 0
    cached_prompt_tokens: int = 0
    """Tokens of the prompt that the base took over from another sequence."""
    rounds: int = 0
    emitted: int = 0
    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    overhead_seconds: float = 0.0

    def verified(self, proposed: int, accepted: int) -> None:
        """A verify forward that emitted tokens: ``accepted`` of ``proposed``, and one more."""
        self.rounds += 1
        if proposed > len(self.proposed):
            grow = proposed - len(self.proposed)
            self.proposed.extend([0] * grow)
            self.accepted.extend([0] * grow)
        for position in range(proposed):
            self.proposed[position] += 1
        for position in range(accepted):
            self.accepted[position] += 1

    def spent(self, round_seconds: float, draft_seconds: float, verify_seconds: float) -> None:
        """The time of one round after the first token."""
        self.draft_seconds += draft_seconds
        self.verify_seconds += verify_seconds
        self.overhead_seconds += max(0.0, round_seconds - draft_seconds - verify_seconds)

    def message(self) -> pb.SpeculationStatistics:
        """As the client sees it."""
        proposed, accepted = sum(self.proposed), sum(self.accepted)
        end = self.finished_ns
        admitted = self.admitted_ns or end
        first = self.first_token_ns or end
        return pb.SpeculationStatistics(
            rounds=self.rounds,
            proposed=proposed,
            accepted=accepted,
            proposed_by_position=self.proposed,
            accepted_by_position=self.accepted,
            acceptance_rate=accepted / proposed if proposed else 0.0,
            mean_accepted_length=self.emitted / self.rounds if self.rounds else 0.0,
            seconds=pb.PhaseSeconds(
                queue=(admitted - self.arrived_ns) / 1e9,
                prefill=(first - admitted) / 1e9,
                draft=self.draft_seconds,
                verify=self.verify_seconds,
                overhead=self.overhead_seconds,
                total=(end - self.arrived_ns) / 1e9,
            ),
        )
