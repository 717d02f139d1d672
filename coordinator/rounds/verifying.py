"""The verifier's half of a round: one message, one answer, and what to make of refusals."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field

from outrider.coordinator.requests.sequence import Sequence
from outrider.coordinator.rounds.drafting import Offer
from outrider.coordinator.rounds.scheduler import Plan
from outrider.coordinator.services.connection import VerifyLink
from outrider.coordinator.telemetry.records import NOT_ASKED, ServiceTiming, WallClock
from outrider.protos import speculation_pb2 as pb
from outrider.shared.core.errors import (
    CapacityError,
    OutriderError,
    RefusalCode,
    ServiceUnavailable,
)
from outrider.shared.core.wire import write_open

log = logging.getLogger(__name__)

MOST_STRIKES = 8
NO_ITEM = pb.VerifyItem()


@dataclass(slots=True)
class Asked:
    """One sequence of a verify message."""

    sequence: Sequence
    n: int
    """Length of the log when asked."""
    upto: int
    """Tokens of the log that the message brings the verifier to."""
    rows: int
    item: pb.VerifyItem
    proposed: Sequence_[int] = ()
    """The proposal's tokens."""


@dataclass(slots=True)
class Prepared:
    """A verify message that lacks only the proposals."""

    request: pb.VerifyRequest
    asked: dict[int, Asked]
    """By sequence id."""


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

    @property
    def up(self) -> bool:
        """Whether the verifier is there."""
        return self._link.up

    @property
    def grants(self) -> bool:
        """Whether the verifier runs rounds by itself."""
        return self._link.info is not None and self._link.info.grants

    def prepare(self, plan: Plan[Sequence], traceparent: str = "") -> Prepared:
        """Builds the message of a round; there is time for it while the draft works."""
        made = Prepared(pb.VerifyRequest(traceparent=traceparent), {})
        for sequence in plan.decode:
            self._append(made, sequence, len(sequence.log))
        for sequence, rows in plan.prefill:
            self._append(made, sequence, sequence.base_len(sequence.verify) + rows)
        self._fill_close(made.request)
        return made

    async def verify(
        self,
        prepared: Prepared,
        offers: dict[int, Offer],
        meanwhile: Callable[[], Awaitable[None]],
    ) -> Judged:
        """Sends the round and reads the verdicts; ``meanwhile`` runs while the verifier works."""
        link = self._link
        request, asked = prepared.request, prepared.asked
        for key, offer in offers.items():
            one = asked[key]
            one.proposed = offer.tokens
            one.rows += len(offer.tokens)
            one.item.proposal.extend(offer.tokens)
            if offer.rows:
                one.item.rows.extend(offer.rows)
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
            found = asked.get(verdict.sequence_id)
            if found is not None and found.sequence.verify.epoch == verdict.epoch:
                self._verdict(judged, found, verdict)
        for error in response.errors:
            found = asked.get(error.sequence_id)
            if found is not None and found.sequence.verify.epoch == error.epoch:
                self._refused(judged, found, error)
        return judged

    async def grant(
        self,
        plan: Plan[Sequence],
        grant: pb.Grant,
        traceparent: str,
        each: Callable[[pb.VerifyResponse | None], None],
    ) -> None:
        """Has the verifier run rounds by itself; raises ``ServiceUnavailable``.

        ``each`` is told of every answer, and by None of the link's loss.
        """
        request = self.prepare(plan, traceparent).request
        request.round = self._link.next_number()
        request.grant.CopyFrom(grant)
        await self._link.send(request, each=each)

    async def change(self, change: pb.GrantChange) -> None:
        """Changes or ends the grant."""
        await self._link.tell(pb.VerifyRequest(round=self._link.next_number(), change=change))

    def free_round(self, sequences: dict[int, Sequence], response: pb.VerifyResponse) -> Judged:
        """What one round of a grant did to those of ``sequences`` that still run."""
        judged = Judged()
        offered = {one.sequence_id: one for one in response.free.proposals}
        for verdict in response.verdicts:
            asked = _asked(sequences, offered, verdict.sequence_id, verdict.epoch)
            if asked is not None:
                self._verdict(judged, asked, verdict)
        for error in response.errors:
            asked = _asked(sequences, offered, error.sequence_id, error.epoch)
            if asked is not None:
                self._refused(judged, asked, error)
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

    def _append(self, made: Prepared, sequence: Sequence, upto: int) -> None:
        held = sequence.verify
        if not held.open:
            made.request.open.append(write_open(sequence.opening(held)))
        n = len(sequence.log)
        base = min(held.length, upto - 1)
        item = made.request.items.add(
            sequence_id=sequence.sequence_id,
            epoch=held.epoch,
            base_len=base,
            append=sequence.log[base:upto],
            extend_only=upto < n,
        )
        made.asked[sequence.sequence_id] = Asked(sequence, n, upto, upto - base, item)

    def _fill_close(self, request: pb.VerifyRequest) -> None:
        if self._close:
            request.close.extend(self._close)
            self._close.clear()

    # --- answers -----------------------------------------------------------------------------

    def _verdict(self, judged: Judged, one: Asked, verdict: pb.Verdict) -> None:
        """Checks a verdict against what was asked and notes what the verifier now holds."""
        sequence = one.sequence
        accepted = verdict.num_accepted
        proposed = len(one.proposed)
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
        sequence.verify.full_since = None
        judged.verdicts.append((one, verdict))

    def _refused(self, judged: Judged, one: Asked, error: pb.SequenceError) -> None:
        sequence = one.sequence
        held = sequence.verify
        code = int(error.code)
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


def _asked(
    sequences: dict[int, Sequence], offered: dict[int, pb.Proposal], key: int, epoch: int
) -> Asked | None:
    """What a free-running round did for a sequence; None for one that is over."""
    sequence, offer = sequences.get(key), offered.get(key)
    if sequence is None or offer is None or not sequence.verify.open:
        return None
    if sequence.verify.epoch != epoch:
        return None
    if sequence.output.finish is not None:
        return None  # over by the client's will: its log stands still, the rounds did not yet
    n = len(sequence.log)
    return Asked(sequence, n, n, 1 + len(offer.tokens), NO_ITEM, list(offer.tokens))


def never_fits(sequence: Sequence, arena_tokens: int) -> CapacityError:
    """The error for a sequence that is larger than the whole arena."""
    return CapacityError(
        f"the sequence needs {sequence.capacity} token slots; the KV arena of the base has "
        f"{arena_tokens}",
        permanent=True,
    )
