"""The verifier's half of a round: one message, one answer, and what to make of refusals."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from outrider.coordinator.clients import VerifyLink
from outrider.coordinator.records import NOT_ASKED, ServiceTiming, WallClock
from outrider.coordinator.scheduler import Plan
from outrider.coordinator.sequence import Sequence
from outrider.protos import speculation_pb2 as pb
from outrider.shared.errors import CapacityError, OutriderError, RefusalCode, ServiceUnavailable
from outrider.shared.wire import write_open

log = logging.getLogger(__name__)

MOST_STRIKES = 8


@dataclass(slots=True)
class Asked:
    """One sequence of a verify message."""

    sequence: Sequence
    n: int
    """Length of the log when asked."""
    upto: int
    """Tokens of the log that the message brings the verifier to."""
    rows: int
    proposal: pb.Proposal | None = None


@dataclass(slots=True)
class Judged:
    """What the verifier did with one round."""

    verdicts: list[tuple[Asked, pb.Verdict]] = field(default_factory=list)
    full: list[Sequence] = field(default_factory=list)
    """No room for these now."""
    failed: list[tuple[Sequence, OutriderError]] = field(default_factory=list)
    """These can't go on."""
    refusals: dict[int, int] = field(default_factory=dict)
    """Codes by sequence id, for the record."""
    timing: ServiceTiming = NOT_ASKED
    lost: bool = False
    """The link broke: nothing is known of the round."""


class Verifying:
    """Talks to the verify service."""

    def __init__(self, link: VerifyLink) -> None:
        self._link = link
        self._close: list[int] = []
        self._clock = WallClock()

    async def verify(
        self,
        plan: Plan[Sequence],
        proposals: dict[int, pb.Proposal],
        *,
        traceparent: str = "",
        meanwhile: Callable[[], Awaitable[None]],
    ) -> Judged:
        """Sends the round and reads the verdicts; ``meanwhile`` runs while the verifier works."""
        link = self._link
        request = pb.VerifyRequest(traceparent=traceparent)
        asked: dict[int, Asked] = {}
        for sequence in plan.decode:
            n = len(sequence.log)
            self._append(request, asked, sequence, n, proposals.get(sequence.sequence_id))
        for sequence, rows in plan.prefill:
            base = sequence.verify.base_len(len(sequence.log))
            self._append(request, asked, sequence, base + rows, None)
        self._fill_close(request)
        judged = Judged()
        sent = self._clock()
        try:
            request.round = link.next_number()
            future = await link.send(request)
            await meanwhile()
            response = await future
        except ServiceUnavailable:
            judged.lost = True
            return judged
        timing = response.timing
        judged.timing = ServiceTiming(
            sent, self._clock(), timing.model_seconds, timing.service_seconds, timing.rows
        )
        for verdict in response.verdicts:
            one = asked.get(verdict.sequence_id)
            if one is not None and one.sequence.verify.epoch == verdict.epoch:
                self._verdict(judged, one, verdict)
        for error in response.errors:
            one = asked.get(error.sequence_id)
            if one is not None and one.sequence.verify.epoch == error.epoch:
                self._refused(judged, one, error)
        return judged

    async def flush(self) -> None:
        """Sends what is to be closed, when no other message will carry it."""
        if self._close and self._link.up:
            request = pb.VerifyRequest(round=self._link.next_number())
            self._fill_close(request)
            try:
                await self._link.send(request)
            except ServiceUnavailable:
                return

    def forget(self, sequence: Sequence) -> None:
        """The sequence is over: its extent is freed with the next message."""
        if sequence.verify.open:
            sequence.verify.lose()
            self._close.append(sequence.sequence_id)

    def lost(self, sequences: Iterable[Sequence]) -> None:
        """The stream is gone, and all that the verifier held with it."""
        self._close.clear()
        for sequence in sequences:
            sequence.verify.lose()
            sequence.verify.strikes = 0

    # --- parts of a message ------------------------------------------------------------------

    def _append(
        self,
        request: pb.VerifyRequest,
        asked: dict[int, Asked],
        sequence: Sequence,
        upto: int,
        proposal: pb.Proposal | None,
    ) -> None:
        held = sequence.verify
        if not held.open:
            request.open.append(write_open(sequence.opening(held)))
        n = len(sequence.log)
        base = min(held.length, upto - 1)
        item = pb.VerifyItem(
            sequence_id=sequence.sequence_id,
            epoch=held.epoch,
            base_len=base,
            append=sequence.log[base:upto],
            extend_only=upto < n,
        )
        rows = upto - base
        if proposal is not None:
            item.proposal.extend(proposal.tokens)
            rows += len(proposal.tokens)
            if proposal.rows:
                item.rows.extend(proposal.rows)
        request.items.append(item)
        asked[sequence.sequence_id] = Asked(sequence, n, upto, rows, proposal)

    def _fill_close(self, request: pb.VerifyRequest) -> None:
        if self._close:
            request.close.extend(self._close)
            self._close.clear()

    # --- answers -----------------------------------------------------------------------------

    def _verdict(self, judged: Judged, one: Asked, verdict: pb.Verdict) -> None:
        """Checks a verdict against what was asked and notes what the verifier now holds."""
        sequence = one.sequence
        accepted = verdict.num_accepted
        proposed = 0 if one.proposal is None else len(one.proposal.tokens)
        chosen = verdict.HasField("next_token")
        wanted = one.upto + accepted + chosen
        if verdict.committed_len != wanted or accepted > proposed or chosen != (one.upto == one.n):
            self._give_up(
                judged,
                sequence,
                OutriderError(
                    f"the verify service broke the protocol: committed_len "
                    f"{verdict.committed_len}, expected {wanted}, with {accepted} of {proposed} "
                    "proposed tokens accepted"
                ),
            )
            return
        sequence.verify.length = one.upto + accepted
        sequence.verify.strikes = 0
        judged.verdicts.append((one, verdict))

    def _refused(self, judged: Judged, one: Asked, error: pb.SequenceError) -> None:
        sequence = one.sequence
        held = sequence.verify
        code = error.code
        if not held.open:
            return  # an item behind an open that was refused
        judged.refusals[sequence.sequence_id] = code
        log.debug("verify refused sequence %d: %s", sequence.sequence_id, error.message)
        if code == RefusalCode.NO_CAPACITY:
            held.lose()
            judged.full.append(sequence)
            return
        if code == RefusalCode.KV_MISSING:
            held.length = min(held.length, error.held_len)
        elif code in (RefusalCode.UNKNOWN, RefusalCode.STALE_EPOCH):
            held.lose()
        else:
            message = f"the base model could not go on: {error.message}"
            self._give_up(judged, sequence, OutriderError(message))
            return
        held.strikes += 1
        if held.strikes >= MOST_STRIKES:
            self._give_up(
                judged,
                sequence,
                OutriderError(f"the verify service refuses the sequence: {error.message}"),
            )

    def _give_up(self, judged: Judged, sequence: Sequence, error: OutriderError) -> None:
        judged.failed.append((sequence, error))


def never_fits(sequence: Sequence, arena_tokens: int) -> CapacityError:
    """The error for a sequence that is larger than the whole arena."""
    return CapacityError(
        f"the sequence needs {sequence.capacity} token slots; the KV arena of the base has "
        f"{arena_tokens}",
        permanent=True,
    )
