"""The round loop: admission, rounds, ends and failures of all requests, in one task.

Everything that changes a sequence happens in this task, so there are no locks. Clients' calls
only set flags and drain queues.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from outrider.coordinator.requests.prefix_cache import PrefixCache
from outrider.coordinator.requests.running import Job
from outrider.coordinator.requests.sequence import Sequence
from outrider.coordinator.requests.text.stopping import FinishReason
from outrider.coordinator.requests.validation import GenerationRequest
from outrider.coordinator.rounds.commit import Outcome
from outrider.coordinator.rounds.controller.choose_k import Speculation
from outrider.coordinator.rounds.controller.costs import Point
from outrider.coordinator.rounds.drafting import Drafting
from outrider.coordinator.rounds.granted import GrantRun
from outrider.coordinator.rounds.jobs import Jobs
from outrider.coordinator.rounds.round import RoundRunner
from outrider.coordinator.rounds.scheduler import RoundPlan, Scheduler
from outrider.coordinator.rounds.verifying import Verifying
from outrider.coordinator.services.connection import DraftConnection, VerifyConnection
from outrider.coordinator.telemetry.records import ConnectionRecord, Observer, WallClock
from outrider.shared.core.errors import OutriderError, ServiceUnavailable

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.05
"""Pause before room is asked for again that nobody here can free."""


class RoundLoop:
    """Runs all requests over the two services."""

    def __init__(
        self,
        *,
        scheduler: Scheduler[Sequence],
        jobs: Jobs,
        rounds: RoundRunner,
        drafting: Drafting,
        verifying: Verifying,
        speculation: Speculation,
        verify_connection: VerifyConnection,
        draft_connection: DraftConnection | None,
        observer: Observer,
        clock: WallClock,
        patience: float,
    ) -> None:
        """``patience``: seconds that requests wait for a verifier that is away."""
        self._scheduler = scheduler
        self._jobs = jobs
        self._rounds = rounds
        self._drafting = drafting
        self._verifying = verifying
        self._speculation = speculation
        self._verify_connection = verify_connection
        self._draft_connection = draft_connection
        self._observer = observer
        self._clock = clock
        self._patience = patience
        self._wake = asyncio.Event()
        self._away_since: float | None = None
        self._last_ns = 0  # end of the last round; 0 after a pause
        self._regrant = False  # something changed that rounds running by themselves can't know
        self._learn_limits()

    @property
    def running(self) -> int:
        """Sequences running now."""
        return self._scheduler.admitted

    @property
    def waiting(self) -> int:
        """Sequences waiting for admission."""
        return self._scheduler.waiting

    @property
    def prefix_caches(self) -> dict[str, PrefixCache]:
        """What is cached at each service, by its name."""
        caches = {"verify": self._verifying.cache}
        if self._draft_connection is not None:
            caches["draft"] = self._drafting.cache
        return caches

    # --- called from clients' calls ------------------------------------------------------------

    def submit(self, request: GenerationRequest, arrived_ns: int) -> Job:
        """Queues a request; raises ``CapacityError`` and ``ServiceUnavailable``."""
        if self._away_since is not None and self._overdue():
            raise self._away()
        job = self._jobs.submit(request, arrived_ns)
        self._wake.set()
        return job

    def end(self, job: Job, reason: FinishReason) -> None:
        """Ends a request from outside; its extents are freed with the next messages."""
        self._jobs.end(job, reason)
        self._wake.set()

    # --- called from the connections -------------------------------------------------------------

    def verify_changed(self, up: bool, reason: str) -> None:
        """The connection to the verifier came up or went away."""
        if not up:
            running = self._scheduler.running
            self._verifying.lost(running)
            self._note_connection("verify", up, reason, len(running))
            if self._away_since is None:
                self._away_since = time.monotonic()
        else:
            self._away_since = None
            self._note_connection("verify", up, reason, 0)
            self._learn_limits()
        self._regrant = True
        self._scheduler.retry()
        self._wake.set()

    def draft_changed(self, up: bool, reason: str) -> None:
        """The connection to the draft came up or went away."""
        running = self._scheduler.running
        if not up:
            self._drafting.lost(running)
        else:
            self._learn_limits()
        self._note_connection("draft", up, reason, 0 if up else len(running))
        self._regrant = True
        self._wake.set()

    # --- the loop --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Runs rounds until cancelled; on the way out every request is failed."""
        try:
            while True:
                self._jobs.reap()
                if not self._verify_connection.up:
                    await self._wait_for_verifier()
                    continue
                plan = self._scheduler.plan()
                self._rounds.hold_back(plan)
                if plan:
                    await self._round(plan)
                elif plan.held:
                    await self._await_draft(plan)
                else:
                    await self._idle()
        finally:
            self._jobs.fail_all(ServiceUnavailable("the coordinator is shutting down"))

    async def _round(self, plan: RoundPlan[Sequence]) -> None:
        """One round of ``plan``, or as many as the services are granted."""
        started_ns = self._last_ns or self._clock()
        run: GrantRun | None = None
        try:
            ks = self._rounds.choose(plan)
            if len(plan.decode) == self._scheduler.admitted:
                self._regrant = False
                run = await self._rounds.grant(plan, ks, self._wake.set)
            if run is not None:
                await self._follow(run)
                return
            outcome = await self._rounds.round(
                plan, ks, started_ns, self._hand_over, self._scheduler.waiting
            )
        except Exception as error:
            # A bug must not take down the other requests, nor the loop.
            log.exception("a round failed")
            self._last_ns = 0
            failure = OutriderError(f"internal error: {type(error).__name__}")
            for sequence in [*plan.decode, *(sequence for sequence, _ in plan.prefill)]:
                self._jobs.finish(sequence, failure)
            if run is not None:
                await self._end(run)
            return
        self._last_ns = self._clock()
        self._settle(outcome)
        if not outcome.progressed and not outcome.lost:
            # Nothing moved: somebody else has the room, or refusals are being worked off.
            self._last_ns = 0
            await asyncio.sleep(RETRY_SECONDS if outcome.full else 0)

    async def _await_draft(self, plan: RoundPlan[Sequence]) -> None:
        """Nothing can run but what the draft is to come near to first: waits until it is nearer,
        or something else happens."""
        await self._rounds.catch_up(plan)
        self._hand_over()
        self._drafting.when_free(self._wake.set)
        await self._sleep(None if self._drafting.busy else RETRY_SECONDS)

    async def _follow(self, run: GrantRun) -> None:
        """Takes in the rounds that the services run by themselves, until they end."""
        while not run.over:
            await self._wake.wait()
            self._wake.clear()
            ended = False
            while run.reports:
                outcome = self._rounds.take_report(run, self._scheduler.waiting)
                self._settle(outcome)
                ended = ended or bool(outcome.finished or outcome.failed or outcome.full)
            if ended or self._jobs.ended or self._regrant or self._scheduler.admits:
                await self._rounds.revoke(run)
            else:
                await self._rounds.steer(run)
            self._hand_over()
        await self._rounds.finish(run)
        self._last_ns = self._clock()

    async def _end(self, run: GrantRun) -> None:
        """Ends rounds of which nothing is wanted any more."""
        await self._rounds.revoke(run)
        while not run.over:
            await self._wake.wait()
            self._wake.clear()
            run.drop()
        await self._rounds.finish(run)

    def _settle(self, outcome: Outcome) -> None:
        info = self._verify_connection.info
        self._jobs.settle(outcome, None if info is None else info.model.arena_longest)

    async def _idle(self) -> None:
        """Nothing can run: tell the services what to free and to cache, and wait."""
        self._last_ns = 0
        await self._verifying.flush()
        await self._drafting.flush()
        self._hand_over()
        # With nothing to run here, the room that the head of the queue waits for is held by
        # somebody else, who will not tell.
        alone = self._scheduler.full
        await self._sleep(RETRY_SECONDS if alone else None)
        if alone:
            self._scheduler.retry()

    async def _wait_for_verifier(self) -> None:
        self._last_ns = 0
        self._hand_over()
        if self._away_since is None:
            self._away_since = time.monotonic()
        if self._overdue():
            self._jobs.fail_all(self._away())
            await self._sleep(None)
        else:
            await self._sleep(self._away_since + self._patience - time.monotonic())

    async def _sleep(self, seconds: float | None) -> None:
        """Until woken, or until the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        self._wake.clear()

    def _overdue(self) -> bool:
        since = self._away_since
        return since is not None and time.monotonic() - since >= self._patience

    def _away(self) -> ServiceUnavailable:
        failure = self._verify_connection.failure
        reason = f": {failure}" if failure is not None else ""
        return ServiceUnavailable(f"the base model's service is away{reason}")

    # --- parts -----------------------------------------------------------------------------------

    def _learn_limits(self) -> None:
        """Takes the largest K that the services allow now, and what their rounds cost."""
        limits = [
            one.info.max_k
            for one in (self._verify_connection, self._draft_connection)
            if one and one.info
        ]
        self._speculation.max_k = min([self._speculation.limit, *limits])
        self._speculation.costs.calibrate(
            _measured(self._verify_connection), _measured(self._draft_connection)
        )

    def _hand_over(self) -> None:
        """Gives records to the observer; called while the verifier works, or nobody does."""
        self._rounds.hand_over()
        self._jobs.hand_over()

    def _note_connection(self, service: str, up: bool, reason: str, sequences: int) -> None:
        if self._observer.follows:
            self._observer.connection(
                ConnectionRecord(service, up, self._clock(), reason, sequences)
            )


def _measured(connection: VerifyConnection | DraftConnection | None) -> list[Point]:
    """What a service measured of its rounds at its start."""
    info = connection.info if connection is not None else None
    if info is None:
        return []
    return [(one.sequences, one.amount, one.seconds) for one in info.costs]
