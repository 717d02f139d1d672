"""Requests from submission to end: who waits, who runs, who is over and why."""

from __future__ import annotations

import itertools
import time
from collections import deque

from outrider.coordinator.requests.running import Job
from outrider.coordinator.requests.sequence import Sequence
from outrider.coordinator.requests.text.stopping import Finish, FinishReason
from outrider.coordinator.requests.text.tokenizer import Tokenizer
from outrider.coordinator.requests.validation import GenerationRequest
from outrider.coordinator.rounds.commit import Outcome
from outrider.coordinator.rounds.controller.choose_k import Speculation
from outrider.coordinator.rounds.drafting import Drafting
from outrider.coordinator.rounds.recording import request_record
from outrider.coordinator.rounds.scheduler import Scheduler
from outrider.coordinator.rounds.verifying import Verifying, never_fits
from outrider.coordinator.telemetry.records import Observer, RequestRecord, WallClock
from outrider.shared.core.errors import CapacityError, OutriderError


class Jobs:
    """All requests; their sequences are in the scheduler's queue, or admitted."""

    def __init__(
        self,
        scheduler: Scheduler[Sequence],
        drafting: Drafting,
        verifying: Verifying,
        speculation: Speculation,
        *,
        tokenizer: Tokenizer | None,
        observer: Observer,
        clock: WallClock,
        patience: float,
    ) -> None:
        """``patience``: seconds that a sequence which ran waits for room after a failure."""
        self._scheduler = scheduler
        self._drafting = drafting
        self._verifying = verifying
        self._speculation = speculation
        self._tokenizer = tokenizer
        self._observer = observer
        self._clock = clock
        self._patience = patience
        self._ids = itertools.count(1)
        self._jobs: dict[Sequence, Job] = {}
        self._ended: list[Sequence] = []
        self._records: deque[RequestRecord] = deque()

    # --- called from clients' calls ------------------------------------------------------------

    def submit(self, request: GenerationRequest, arrived_ns: int) -> Job:
        """Queues a request; raises ``CapacityError``."""
        job = Job(
            request,
            self._tokenizer,
            self._ids,
            arrived_ns,
            self._speculation.everyone,
            draft=self._drafting.cache,
            verify=self._verifying.cache,
        )
        self._scheduler.submit(job.samples)
        for sample in job.samples:
            self._jobs[sample] = job
            if sample.output.finish is not None:  # the resumed tokens already hold the end
                self._ended.append(sample)
        return job

    def end(self, job: Job, reason: FinishReason) -> None:
        """Ends a request from outside; it is over with the next ``reap``."""
        job.end(Finish(reason))
        self._ended.extend(sample for sample in job.samples if sample in self._jobs)

    # --- called from the round loop ------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether there is something to ``reap``."""
        return bool(self._ended)

    def reap(self) -> None:
        """Takes out sequences that were ended from outside."""
        ended, self._ended = self._ended, []
        for sequence in ended:
            self.finish(sequence)

    def settle(self, outcome: Outcome, arena_longest: int | None) -> None:
        """Does what a round left to do; ``arena_longest``: of the base, where known."""
        for sequence in outcome.admitted:
            self._jobs[sequence].changed.set()
        for sequence in outcome.finished:
            self.finish(sequence)
        for sequence, error in outcome.failed:
            self.finish(sequence, error)
        # The last refused goes back first, so that the queue keeps its order.
        for sequence in reversed(outcome.full):
            if arena_longest is not None and sequence.capacity > arena_longest:
                self.finish(sequence, never_fits(sequence, arena_longest))
            elif not sequence.statistics.admitted_ns:
                self._drafting.forget(sequence)
                self._scheduler.refuse(sequence)
            elif _homeless_for(sequence) > self._patience:
                self.finish(
                    sequence,
                    CapacityError(
                        "the base came back without room for the sequence, which needs "
                        f"{sequence.capacity} token slots"
                    ),
                )

    def finish(self, sequence: Sequence, error: OutriderError | None = None) -> None:
        """A sequence is over, with ``error`` if that is why; both services let go of it, or cache
        what is not in doubt."""
        job = self._jobs.pop(sequence, None)
        if job is None:
            return
        self._scheduler.remove(sequence)
        self._drafting.forget(sequence, cache=error is None)
        self._verifying.forget(sequence, cache=error is None)
        sequence.statistics.finished_ns = self._clock()
        if error is not None:
            job.fail(error)
            for other in job.samples:
                if other is not sequence and other in self._jobs:
                    self._ended.append(other)
        job.close(sequence)
        if self._observer.follows:
            self._records.append(request_record(sequence, error))

    def fail_all(self, error: OutriderError) -> None:
        """Every request is over, running or waiting."""
        for sequence in self._scheduler.drop_all():
            self.finish(sequence, error)
        self.reap()

    def hand_over(self) -> None:
        """Gives the records of requests that are over to the observer."""
        while self._records:
            self._observer.request(self._records.popleft())


def _homeless_for(sequence: Sequence) -> float:
    """Seconds since a sequence that ran was first refused room after a failure."""
    now = time.monotonic()
    state = sequence.verify
    state.full_since = now if state.full_since is None else state.full_since
    return now - state.full_since
