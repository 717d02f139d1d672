"""Makes the records of rounds and requests from what the round loop has at hand."""

from __future__ import annotations

from dataclasses import dataclass

from outrider.coordinator.requests.sequence import Sequence
from outrider.coordinator.rounds.controller.choose_k import ChosenKs
from outrider.coordinator.rounds.draft_messages import Proposals
from outrider.coordinator.rounds.scheduler import RoundPlan
from outrider.coordinator.rounds.verifying import Verdicts
from outrider.coordinator.telemetry.records import RequestRecord, RoundRecord, SequenceRound
from outrider.shared.core.errors import OutriderError
from outrider.shared.core.links import MESSAGES

NO_CHOICE = ChosenKs((), 0.0, 0.0, "")


@dataclass(frozen=True, slots=True)
class DoneRound:
    """A round whose verdicts are in the logs, by messages or granted."""

    number: int
    traceparent: str
    plan: RoundPlan[Sequence]
    ks: list[int]
    proposals: Proposals
    verdicts: Verdicts
    started_ns: int
    finished_ns: int
    waiting: int
    """Sequences waiting for admission."""
    choice: ChosenKs
    """The server's choice of Ks that was in force."""
    link: str = MESSAGES
    begins: bool = False
    """Whether it is the first one of a grant."""

    @property
    def seconds(self) -> float:
        """From the end of the round before to its own."""
        return (self.finished_ns - self.started_ns) / 1e9


def round_record(done: DoneRound) -> RoundRecord:
    """The record of a round; to be made before the next one is committed."""
    plan, verdicts = done.plan, done.verdicts
    asked_k = {seq.sequence_id: k for seq, k in zip(plan.decode, done.ks, strict=True)}
    answered = {one.sequence.sequence_id: (one, verdict) for one, verdict in verdicts.given}
    made = []
    for seq in (*plan.decode, *(seq for seq, _ in plan.prefill)):
        key = seq.sequence_id
        found = answered.get(key)
        proposal = done.proposals.by_id.get(key)
        proposed = 0 if proposal is None else len(proposal.tokens)
        accepted = emitted = rows = 0
        n = len(seq.log)
        if found is not None:
            one, verdict = found
            n, rows, accepted = one.n, one.rows, verdict.num_accepted
            emitted = len(seq.log) - n
        made.append(
            SequenceRound(
                request_id=seq.request.request_id,
                sample_index=seq.sample_index,
                sequence_id=key,
                committed_len=n,
                k=asked_k.get(key, 0),
                proposed=proposed,
                accepted=accepted,
                emitted=emitted,
                rows=rows,
                rollback=proposed - accepted if found is not None else 0,
                verify_epoch=seq.verify.epoch,
                draft_epoch=seq.draft.epoch,
                refused=verdicts.refusals.get(key, 0),
            )
        )
    choice = done.choice if any(seq.request.k is None for seq in plan.decode) else NO_CHOICE
    return RoundRecord(
        round=done.number,
        traceparent=done.traceparent,
        started_ns=done.started_ns,
        finished_ns=done.finished_ns,
        draft=done.proposals.timing,
        verify=verdicts.timing,
        sequences=tuple(made),
        waiting=done.waiting,
        link=done.link,
        lost="verify" if verdicts.lost else "",
        k_reason=choice.why,
        foreseen_rate=choice.rate,
        foreseen_plain_rate=choice.plain,
    )


def request_record(sequence: Sequence, error: OutriderError | None) -> RequestRecord:
    """The record of a sample that is over, with ``error`` if that is why."""
    statistics, request = sequence.statistics, sequence.request
    finish = sequence.output.finish
    reason = error.status if error is not None else finish.reason.name if finish else ""
    return RequestRecord(
        request_id=request.request_id,
        sample_index=sequence.sample_index,
        sequence_id=sequence.sequence_id,
        traceparent=request.traceparent,
        arrived_ns=statistics.arrived_ns,
        admitted_ns=statistics.admitted_ns,
        first_token_ns=statistics.first_token_ns,
        finished_ns=statistics.finished_ns,
        prompt_tokens=len(request.prompt_ids),
        cached_prompt_tokens=statistics.cached_prompt_tokens,
        completion_tokens=sequence.output.emitted,
        reason=reason,
        error="" if error is None else str(error),
        k=request.k,
        rule=sequence.decoding.rule.name,
        temperature=sequence.decoding.temperature,
        rounds=statistics.rounds,
        proposed_by_position=tuple(statistics.proposed),
        accepted_by_position=tuple(statistics.accepted),
        decoding=sequence.decoding,
        max_new_tokens=request.max_new_tokens,
        num_samples=request.num_samples,
    )
