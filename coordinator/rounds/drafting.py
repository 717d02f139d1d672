"""The draft's half of a round: proposals on the critical path, catching up beside it.

What the draft holds is tracked ahead of its answers: messages of one stream are handled in
order, so a proposal may be asked for right behind the chunk that it builds on. A refusal sets
the record straight. The draft is never necessary: when it is away, late or refuses, the round
goes on without its proposals.

A prompt is the draft's business only when the base has written the first token after it: on one
device the two would compete, and on two the draft is done soon enough, for its prompt costs a
fraction of the base's. What it takes in within the set time goes along with the proposal, so that
a short answer has its proposals from the second token on. Of more than that the draft takes in
what comes before in the background, and the sequence decodes without it. While the draft is busy
so, nobody asks it for proposals: the base decodes alone, and is not delayed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from outrider.coordinator.requests.prefix_cache import PrefixCache
from outrider.coordinator.requests.sequence import Sequence as Seq
from outrider.coordinator.requests.service_state import ServiceState
from outrider.coordinator.rounds.draft_messages import (
    DraftAsked,
    DraftGrant,
    Proposals,
    append_item,
    append_wanted,
)
from outrider.coordinator.rounds.prompt_budget import PromptBudget
from outrider.coordinator.rounds.scheduler import share_out
from outrider.coordinator.services.connection import DraftConnection
from outrider.coordinator.telemetry.records import ServiceTiming, WallClock
from outrider.protos import speculation_pb2 as pb
from outrider.shared.core.errors import RefusalCode, ServiceUnavailable

MOST_STRIKES = 5
LAG = 24
"""So many rows go along with a proposal at no cost worth counting."""


class Drafting:
    """Talks to the draft service."""

    def __init__(
        self,
        connection: DraftConnection | None,
        *,
        cache: PrefixCache,
        budget: PromptBudget,
        patience: float,
    ) -> None:
        """``cache``: what the draft has of other sequences, and of those that are over.
        ``budget``: of what is caught up at a time; ``patience``: seconds to wait for answers."""
        self._connection = connection
        self._budget = budget
        self._patience = patience
        self.cache = cache
        self._late = False  # an answer that nobody waited for is still to come
        self._clock = WallClock()
        self._blocked: set[Seq] = set()
        self._behind: asyncio.Future[pb.DraftResponse | None] | None = None
        """The answer to what was last sent in the background."""

    @property
    def available(self) -> bool:
        """Whether proposals can be asked for now."""
        return self._connection is not None and self._connection.up and not self._late

    def usable(self, sequence: Seq) -> bool:
        """Whether the draft can serve this sequence."""
        state = sequence.draft
        return not (state.given_up or state.blocked) and sequence.may_open(state)

    @property
    def busy(self) -> bool:
        """Whether it is still to answer what was sent in the background."""
        return self._behind is not None and not self._behind.done()

    def when_free(self, call: Callable[[], None]) -> None:
        """Has ``call`` called when it has answered that, is late with it or lost."""
        if self._behind is not None:
            self._behind.add_done_callback(lambda _: call())

    def near(self, sequences: Iterable[Seq], *, prompts: bool = True) -> set[Seq]:
        """Those that may have a proposal in one round, for all that it takes along: without
        ``prompts`` no more than costs nothing, but for those that wait for a proposal.

        What they lack together is taken in within the set time. Those that wait for a proposal
        (``awaited``) come first: whether they get one must not depend on who else is there.
        """
        budget = self._budget.rows(delays=True)
        found: set[Seq] = set()
        for seq in sorted(sequences, key=lambda seq: not seq.replays_rounds):
            if not (seq.started and self.usable(seq)):
                continue  # its first token waits for no draft
            lag = _lag(seq)
            if lag > LAG:
                if lag > budget or not (prompts or seq.replays_rounds):
                    continue
                budget -= lag
            found.add(seq)
        return found

    def awaited(self, sequences: Iterable[Seq]) -> list[Seq]:
        """Those of ``sequences`` that are to wait until they can have a proposal.

        Where rounds with a proposal and rounds without draw different tokens, a text must not
        depend on how soon the draft is done with prompts.
        """
        if not self.available:
            return []
        waiting = [
            seq
            for seq in sequences
            if seq.replays_rounds
            and seq.started
            and seq.max_k > 0
            and not (seq.draft.given_up or seq.draft.blocked)
        ]
        near = set() if self.busy else self.near(waiting)
        return [seq for seq in waiting if seq not in near]

    async def propose(
        self,
        wanted: Sequence[tuple[Seq, int]],
        traceparent: str = "",
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Proposals:
        """Asks for ``k`` tokens each; comes back empty-handed rather than late.

        ``meanwhile`` is called once, while the draft works if it does.
        """
        made = Proposals()
        connection = self._connection
        if not wanted or connection is None or not self.available:
            meanwhile()
            return made
        request = self._request(connection, traceparent)
        asked, most = append_wanted(request, wanted)
        made.clean = most <= LAG
        sent = self._clock()
        try:
            future = await self._send(connection, request, asked)
        except ServiceUnavailable:
            meanwhile()
            return made
        meanwhile()
        response = await self._patiently(future)
        if response is None:
            return made
        made.timing = ServiceTiming.told(sent, self._clock(), response.timing)
        for proposal in response.proposals:
            found = asked.get(proposal.sequence_id)
            offer = found.offer(proposal) if found is not None else None
            if found is not None and offer is not None:
                found.sequence.draft.strikes = 0
                if offer.tokens:
                    made.by_id[proposal.sequence_id] = offer
        self._absorb(response, asked)
        return made

    def lacking(self, sequence: Seq) -> bool:
        """Whether the draft has to be brought nearer to the log before it runs by itself."""
        state = sequence.draft
        return not state.open or len(sequence.log) - state.length > LAG

    async def grant(
        self, wanted: Sequence[tuple[Seq, int]], grant: pb.Grant, traceparent: str
    ) -> DraftGrant:
        """Has the draft run rounds by itself; raises ``ServiceUnavailable``."""
        connection = self._connection
        assert connection is not None
        request = self._request(connection, traceparent)
        request.grant.CopyFrom(grant)
        asked, _ = append_wanted(request, wanted)
        return DraftGrant(await self._send(connection, request, asked), asked)

    async def granted(self, granted: DraftGrant, *, wait: bool = True) -> int:
        """The verifier ended the grant: the draft says so too, at once or late.

        Without ``wait`` it is late where it has not said so yet. Returns the rounds that it
        proposed for; 0 where it is late or lost.
        """
        if not wait:
            self._give_up(granted.answer)
        response = await self._patiently(granted.answer)
        if response is None:
            return 0
        self._absorb(response, granted.asked)
        return response.grant_end.rounds

    async def change(self, change: pb.GrantChange) -> None:
        """Changes or ends the draft's grant from here; the verifier's word is the usual way."""
        if self._connection is not None:
            await self._connection.tell(
                pb.DraftRequest(round=self._connection.next_number(), change=change)
            )

    def touch(self) -> None:
        """The verifier had proposals: the draft is alive."""
        if self._connection is not None:
            self._connection.touch()

    async def catch_up(
        self, sequences: Iterable[Seq], traceparent: str = "", *, delays: bool = False
    ) -> bool:
        """Sends some of what the draft lacks, without waiting for the answer.

        What a proposal takes along at no cost is left to the next one; that opens a sequence, too.
        ``delays``: whether others want proposals meanwhile. Returns whether there was anything
        to send.
        """
        connection = self._connection
        if connection is None or not connection.up or connection.waiting:
            return False
        # Of all first: a prompt that this very message brings can't be shared in it.
        behind = [one for one in sequences if self.usable(one) and _lag(one) > LAG]
        if not behind:
            return False
        held = [one.base_len(one.draft) for one in behind]
        lacks = [len(one.log) - base for one, base in zip(behind, held, strict=True)]
        request = self._request(connection, traceparent)
        asked: dict[int, DraftAsked] = {}
        shares = share_out(lacks, self._budget.rows(delays=delays))
        for sequence, base, rows in zip(behind, held, shares, strict=True):
            if rows:
                asked[sequence.sequence_id] = DraftAsked(sequence, len(sequence.log), 0)
                append_item(request, sequence, base + rows, 0)
        await self._send_behind(connection, request, asked)
        return True

    async def flush(self) -> None:
        """Sends what is to be closed or cached, when no other message will carry it."""
        connection = self._connection
        if connection is None or not connection.up or not self.cache.waits:
            return
        await self._send_behind(connection, self._request(connection), {})

    def settle(self, sequence: Seq, n: int, proposed: int, accepted: int) -> None:
        """The verdict on a proposal: what of the draft's KV is of the log."""
        sequence.draft.length = min(n + accepted, n + proposed - 1)

    def forget(self, sequence: Seq, *, cache: bool = False) -> None:
        """The sequence is over: its extent is freed with the next message, or cached if
        ``cache``."""
        self._blocked.discard(sequence)
        self._release(sequence, cache=cache)

    def lost(self, sequences: Iterable[Seq]) -> None:
        """The stream is gone, and all that the draft held with it."""
        self.cache.lost()
        self._blocked.clear()
        self._late = False
        if self._behind is not None:
            _expire(self._behind)
        for sequence in sequences:
            state = sequence.draft
            state.release()
            state.blocked = state.given_up = False
            state.strikes = 0

    # --- parts -------------------------------------------------------------------------------

    def _release(self, sequence: Seq, *, cache: bool = False) -> None:
        """What the draft may hold of it makes room for those that were refused it."""
        if sequence.leave(sequence.draft, cache=cache):
            for other in self._blocked:
                other.draft.blocked = False
            self._blocked.clear()

    def _request(self, connection: DraftConnection, traceparent: str = "") -> pb.DraftRequest:
        """The next message, with what is to be closed and cached."""
        request = pb.DraftRequest(round=connection.next_number(), traceparent=traceparent)
        self.cache.fill(request)
        return request

    async def _send(
        self, connection: DraftConnection, request: pb.DraftRequest, asked: dict[int, DraftAsked]
    ) -> asyncio.Future[pb.DraftResponse]:
        """Sends a message; its answer is absorbed here only where it comes too late."""
        return await connection.send(request, partial(self._came_late, asked=asked))

    async def _send_behind(
        self, connection: DraftConnection, request: pb.DraftRequest, asked: dict[int, DraftAsked]
    ) -> None:
        """Sends a message that no round waits for; the draft is busy until it is answered."""
        if self._behind is not None:
            _expire(self._behind)  # answers come in order: the one to come now says as much
        behind: asyncio.Future[pb.DraftResponse | None]
        behind = self._behind = asyncio.get_running_loop().create_future()
        timer = asyncio.get_running_loop().call_later(self._patience, self._give_up, behind)
        behind.add_done_callback(lambda _: timer.cancel())

        def answered(answer: pb.DraftResponse) -> None:
            self._learn(answer)
            if behind.done():
                self._came_late(answer, asked)
            else:
                behind.set_result(answer)
                self._absorb(answer, asked)

        try:
            future = await connection.send(request, answered)
        except ServiceUnavailable:
            _expire(behind)
            return
        # The answer may have come while the message was on its way out.
        if not future.done():
            _expire(future)
        elif future.exception() is None:
            answered(future.result())

    def _learn(self, answer: pb.DraftResponse) -> None:
        """What taking in costs."""
        if answer.timing.rows and not answer.errors:
            self._budget.observe(answer.timing.rows, answer.timing.model_seconds)

    async def _patiently(self, future: asyncio.Future[Any]) -> pb.DraftResponse | None:
        """The answer; None where it is late, or the draft is lost."""
        timer = asyncio.get_running_loop().call_later(self._patience, self._give_up, future)
        try:
            answer: pb.DraftResponse | None = await future
            return answer
        except ServiceUnavailable:
            return None
        finally:
            timer.cancel()

    def _give_up(self, future: asyncio.Future[Any]) -> None:
        """Waits no longer; nothing is asked until the answer comes, or the stream is lost.

        Noted here and not by whoever awaits the future: by the time that one runs, either may
        have happened.
        """
        if not future.done():
            future.set_result(None)
            self._late = True

    def _came_late(self, answer: pb.DraftResponse, asked: dict[int, DraftAsked]) -> None:
        self._late = False
        self._absorb(answer, asked)

    def _absorb(self, response: pb.DraftResponse, asked: dict[int, DraftAsked]) -> None:
        self.cache.evicted(response.evicted)
        for proposal in response.proposals:
            found = asked.get(proposal.sequence_id)
            if found is not None and found.sequence.draft.epoch == proposal.epoch:
                found.sequence.confirm(found.sequence.draft)
        for error in response.errors:
            found = asked.get(error.sequence_id)
            if found is not None and found.sequence.draft.epoch == error.epoch:
                self._refused(found.sequence, found.sequence.draft, error)

    def _refused(self, sequence: Seq, state: ServiceState, error: pb.SequenceError) -> None:
        if not state.open:
            return  # an item behind an open that was refused, or a sequence that is over
        code = int(error.code)
        if code == RefusalCode.KV_MISSING:
            state.lack(error.held_len)
        elif code == RefusalCode.NO_CAPACITY:
            state.lose()
            state.blocked = True
            self._blocked.add(sequence)
            return
        else:
            state.lose()
            if code in (RefusalCode.INVALID, RefusalCode.MODEL):
                self._release(sequence)
            state.given_up = code == RefusalCode.INVALID
        state.strikes += 1
        if state.strikes >= MOST_STRIKES:
            state.given_up = True


def _lag(sequence: Seq) -> int:
    """Rows that the draft lacks of the log."""
    return len(sequence.log) - sequence.base_len(sequence.draft)


def _expire(future: asyncio.Future[Any]) -> None:
    """Nobody waits for the answer any more."""
    if not future.done():
        future.set_result(None)
