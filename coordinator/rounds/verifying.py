"""The verifier's half of a round: one message, one answer, and what to make of refusals."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field

from outrider.coordinator.requests.prefix_cache import PrefixCache
from outrider.coordinator.requests.sequence import Sequence
from outrider.coordinator.rounds.draft_messages import DraftOffer
from outrider.coordinator.rounds.scheduler import RoundPlan
from outrider.coordinator.services.connection import VerifyConnection
from outrider.coordinator.telemetry.records import NOT_ASKED, ServiceTiming, WallClock
from outrider.protos import speculation_pb2 as pb
from outrider.shared.core.errors import (
    CapacityError,
    InvalidRequest,
    OutriderError,
    RefusalCode,
    ServiceUnavailable,
)
from outrider.shared.core.wire import write_open

log = logging.getLogger(__name__)

MOST_STRIKES = 8
NO_ITEM = pb.VerifyItem()


@dataclass(slots=True)
class VerifyAsked:
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
    asked: dict[int, VerifyAsked]
    """By sequence id."""


@dataclass(slots=True)
class Verdicts:
    """What the verifier did with one round."""

    given: list[tuple[VerifyAsked, pb.Verdict]] = field(default_factory=list)
    full: list[Sequence] = field(default_factory=list)
    """No room for these now."""
    failed: list[tuple[Sequence, OutriderError]] = field(default_factory=list)
    """These can't go on."""
    refusals: dict[int, int] = field(default_factory=dict)
    """Codes by sequence id, for the record."""
    timing: ServiceTiming = NOT_ASKED
    lost: bool = False
    """The connection broke: nothing is known of the round."""


class Verifying:
    """Talks to the verify service."""

    def __init__(self, connection: VerifyConnection, cache: PrefixCache) -> None:
        """``cache``: what the verifier has of other sequences, and of those that are over."""
        self._connection = connection
        self.cache = cache
        self._clock = WallClock()

    @property
    def up(self) -> bool:
        """Whether the verifier is there."""
        return self._connection.up

    @property
    def grants(self) -> bool:
        """Whether the verifier runs rounds by itself."""
        return self._connection.info is not None and self._connection.info.grants

    def prepare(self, plan: RoundPlan[Sequence], traceparent: str = "") -> Prepared:
        """Builds the message of a round; there is time for it while the draft works."""
        made = Prepared(pb.VerifyRequest(traceparent=traceparent), {})
        for sequence in plan.decode:
            self._append(made, sequence, len(sequence.log))
        for sequence, rows in plan.prefill:
            # What it may begin with can be more than when the round was planned.
            most = len(sequence.log) - sequence.shares
            self._append(made, sequence, min(sequence.base_len(sequence.verify) + rows, most))
        self.cache.fill(made.request)
        return made

    async def verify(
        self,
        prepared: Prepared,
        offers: dict[int, DraftOffer],
        meanwhile: Callable[[], Awaitable[None]],
    ) -> Verdicts:
        """Sends the round and reads the verdicts; ``meanwhile`` runs while the verifier works."""
        connection = self._connection
        request, asked = prepared.request, prepared.asked
        for key, offer in offers.items():
            one = asked[key]
            one.proposed = offer.tokens
            one.rows += len(offer.tokens)
            one.item.proposal.extend(offer.tokens)
            if offer.rows:
                one.item.rows.extend(offer.rows)
        verdicts = Verdicts()
        sent = self._clock()
        try:
            request.round = connection.next_number()
            future = await connection.send(request)
            await meanwhile()
            response = await future
        except ServiceUnavailable:
            verdicts.lost = True
            return verdicts
        verdicts.timing = ServiceTiming.told(sent, self._clock(), response.timing)
        self.cache.evicted(response.evicted)
        for verdict in response.verdicts:
            found = asked.get(verdict.sequence_id)
            if found is not None and found.sequence.verify.epoch == verdict.epoch:
                self._verdict(verdicts, found, verdict)
        for error in response.errors:
            found = asked.get(error.sequence_id)
            if found is not None and found.sequence.verify.epoch == error.epoch:
                self._refused(verdicts, found, error)
        return verdicts

    async def grant(
        self,
        plan: RoundPlan[Sequence],
        grant: pb.Grant,
        traceparent: str,
        each: Callable[[pb.VerifyResponse | None], None],
    ) -> None:
        """Has the verifier run rounds by itself; raises ``ServiceUnavailable``.

        ``each`` is told of every answer, and by None of the connection's loss.
        """
        request = self.prepare(plan, traceparent).request
        request.round = self._connection.next_number()
        request.grant.CopyFrom(grant)
        await self._connection.send(request, each=each)

    async def change(self, change: pb.GrantChange) -> None:
        """Changes or ends the grant."""
        await self._connection.tell(
            pb.VerifyRequest(round=self._connection.next_number(), change=change)
        )

    def granted_round(
        self, sequences: dict[int, Sequence], response: pb.VerifyResponse
    ) -> Verdicts:
        """What one round of a grant did to those of ``sequences`` that still run."""
        verdicts = Verdicts()
        offered = {one.sequence_id: one for one in response.granted.proposals}
        for verdict in response.verdicts:
            asked = _asked(sequences, offered, verdict.sequence_id, verdict.epoch)
            if asked is not None:
                self._verdict(verdicts, asked, verdict)
        for error in response.errors:
            asked = _asked(sequences, offered, error.sequence_id, error.epoch)
            if asked is not None:
                self._refused(verdicts, asked, error)
        return verdicts

    async def flush(self) -> None:
        """Sends what is to be closed or cached, when no other message will carry it."""
        if self.cache.waits and self._connection.up:
            request = pb.VerifyRequest(round=self._connection.next_number())
            self.cache.fill(request)
            try:
                answer = await self._connection.send(request)
            except ServiceUnavailable:
                return
            answer.add_done_callback(self._flushed)

    def forget(self, sequence: Sequence, *, cache: bool) -> None:
        """The sequence is over: its extent is freed with the next message, or cached if
        ``cache``."""
        sequence.leave(sequence.verify, cache=cache)

    def lost(self, sequences: Iterable[Sequence]) -> None:
        """The stream is gone, and all that the verifier held with it."""
        self.cache.lost()
        for sequence in sequences:
            sequence.verify.release()
            sequence.verify.strikes = 0

    def _flushed(self, answer: asyncio.Future[pb.VerifyResponse]) -> None:
        if not answer.cancelled() and answer.exception() is None:
            self.cache.evicted(answer.result().evicted)

    # --- parts of a message ------------------------------------------------------------------

    def _append(self, made: Prepared, sequence: Sequence, upto: int) -> None:
        state = sequence.verify
        if not state.open:
            made.request.open.append(write_open(sequence.opening(state)))
        n = len(sequence.log)
        base = min(state.length, upto - 1)
        item = made.request.items.add(
            sequence_id=sequence.sequence_id,
            epoch=state.epoch,
            base_len=base,
            append=sequence.log[base:upto],
            extend_only=upto < n,
        )
        made.asked[sequence.sequence_id] = VerifyAsked(sequence, n, upto, upto - base, item)

    # --- answers -----------------------------------------------------------------------------

    def _verdict(self, verdicts: Verdicts, one: VerifyAsked, verdict: pb.Verdict) -> None:
        """Checks a verdict against what was asked and notes what the verifier now holds."""
        sequence = one.sequence
        accepted = verdict.num_accepted
        proposed = len(one.proposed)
        chosen = verdict.HasField("next_token")
        wanted = one.upto + accepted + chosen
        if verdict.committed_len != wanted or accepted > proposed or chosen != (one.upto == one.n):
            self._give_up(
                verdicts,
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
        sequence.confirm(sequence.verify)
        verdicts.given.append((one, verdict))

    def _refused(self, verdicts: Verdicts, one: VerifyAsked, error: pb.SequenceError) -> None:
        sequence = one.sequence
        state = sequence.verify
        code = int(error.code)
        if not state.open:
            return  # an item behind an open that was refused
        verdicts.refusals[sequence.sequence_id] = code
        log.debug("verify refused sequence %d: %s", sequence.sequence_id, error.message)
        if code == RefusalCode.NO_CAPACITY:
            state.lose()
            verdicts.full.append(sequence)
            return
        if code == RefusalCode.KV_MISSING:
            state.lack(error.held_len)
        elif code in (RefusalCode.UNKNOWN, RefusalCode.STALE_EPOCH):
            state.lose()
        elif code == RefusalCode.NOTHING_ALLOWED:
            self._give_up(verdicts, sequence, nothing_allowed(sequence))
            return
        else:
            message = f"the base model could not go on: {error.message}"
            self._give_up(verdicts, sequence, OutriderError(message))
            return
        state.strikes += 1
        if state.strikes >= MOST_STRIKES:
            self._give_up(
                verdicts,
                sequence,
                OutriderError(f"the verify service refuses the sequence: {error.message}"),
            )

    def _give_up(self, verdicts: Verdicts, sequence: Sequence, error: OutriderError) -> None:
        verdicts.failed.append((sequence, error))


def _asked(
    sequences: dict[int, Sequence], offered: dict[int, pb.Proposal], key: int, epoch: int
) -> VerifyAsked | None:
    """What a granted round did for a sequence; None for one that is over."""
    sequence, offer = sequences.get(key), offered.get(key)
    if sequence is None or offer is None or not sequence.verify.open:
        return None
    if sequence.verify.epoch != epoch:
        return None
    if sequence.output.finish is not None:
        return None  # over by the client's will: its log stands still, the rounds did not yet
    n = len(sequence.log)
    return VerifyAsked(sequence, n, n, 1 + len(offer.tokens), NO_ITEM, list(offer.tokens))


def nothing_allowed(sequence: Sequence) -> InvalidRequest:
    """The error for a sequence whose every next token is forbidden."""
    decoding, written = sequence.decoding, len(sequence.log) - len(sequence.request.prompt_ids)
    words = len(decoding.bad_words)
    field, value = ("bad_words", f"{words} sequences")
    if not words:
        field, value = "min_new_tokens", str(decoding.min_new_tokens)
    return InvalidRequest(
        f"sampling.{field}",
        value,
        f"such that some token may be chosen at every place; none may after {written} new tokens",
    )


def never_fits(sequence: Sequence, arena_longest: int) -> CapacityError:
    """The error for a sequence that is larger than the whole arena."""
    return CapacityError(
        f"the sequence needs {sequence.capacity} token slots; the KV arena of the base has "
        f"{arena_longest}",
        permanent=True,
    )
