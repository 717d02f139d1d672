"""What an engine's rounds take, timed at start: nobody's tokens pay for finding it out.

Sequences are opened and asked for rounds as a coordinator would, over random tokens, and closed
again. The most telling sizes come first, so that a table that the deadline cut is of use, too.
What the first rounds of a size compile or capture stays, for users as well.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outrider.shared.core.errors import OutriderError
from outrider.shared.core.types import CostPoint, Decoding, OpenSequence
from outrider.shared.rounds.session import Engine, Session

SECONDS = 2.0
SEQUENCES = (1, 8, 32, 64, 4, 16, 2)
"""Sequences of a round, the most telling first; a coordinator runs no more by default."""
FEW, MODEST = 8, 5
"""With more sequences than ``FEW`` no more than ``MODEST`` rows or tokens of each are timed:
nobody looks as far ahead there."""
PROMPT = 16
"""Tokens of a sequence before its timed rounds, where they are taken in quickly. Few: with 64
sequences even these take a processor a third of a second."""
PROMPT_SHARE = 0.05
"""Share of the time after which the prompt grows no longer."""
REPEATS = 5
SLOW_TIMES = 10
"""A first call that takes so many times as long as the others has compiled something."""
SPARE_SECONDS = 5.0
"""Time for that, once for a machine: what was compiled is kept."""
SIZE_SHARE = 0.02
"""Share of the time after which one size is not timed again."""


@dataclass(frozen=True, slots=True)
class TrialPlan:
    """What to time: ``sizes`` are (sequences, amount), the most telling first."""

    sizes: tuple[tuple[int, int], ...]
    prompt: int
    """Most tokens before a timed round, the pending one included."""
    capacity: int
    """Of each sequence."""


def plan_for(engine: Engine[Any, Any]) -> TrialPlan:
    """What is worth timing, as far as context and arena have room for it."""
    amounts, runner = engine.trial_amounts, engine.runner
    ahead = max(amounts, default=0)
    prompt = min(PROMPT, runner.places(PROMPT) - ahead)
    if prompt < 1:
        return TrialPlan((), 0, 0)
    most = runner.arena.room(prompt + ahead)
    counts = [count for count in SEQUENCES if count <= most]
    sizes = [(count, amount) for count in counts for amount in amounts[:2]]
    sizes += [
        (count, amount)
        for amount in amounts[2:]
        for count in counts
        if count <= FEW or amount <= MODEST
    ]
    return TrialPlan(tuple(sizes), prompt, prompt + ahead)


def calibrate(
    engine: Engine[Any, Any],
    plan: TrialPlan,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> list[CostPoint]:
    """Times rounds of an engine that serves nobody yet; each time is the lower quartile of a few,
    for other programs can only make a round longer.

    What would not be done ``seconds`` from now is left out, as far as that can be foreseen; the
    first size never is. So is a size of which no other amount was timed, where others were. The
    arena is as before afterwards. Raises ``OutriderError`` where a sequence or a round is refused.
    """
    session = engine.connect()
    engine.runner.time_device(timed=True)
    try:
        return _Trials(session, plan, seconds, clock).run()
    finally:
        engine.runner.time_device(timed=False)
        session.release()


class _Trials:
    """The sequences that are open, and what rounds over them took so far."""

    def __init__(
        self,
        session: Session[Any, Any],
        plan: TrialPlan,
        seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._session, self._engine, self._plan = session, session.engine, plan
        self._seconds, self._clock = seconds, clock
        self._deadline = clock() + seconds
        self._spare = SPARE_SECONDS
        self._random, self._ids = random.Random(0), itertools.count()
        self._opened: list[tuple[OpenSequence, list[int]]] = []
        """With their tokens: prompt, and what is proposed to follow."""
        self._base_len = 0
        """Tokens that each of them has taken in."""
        self._taken_in: dict[tuple[int, int], float] = {}
        """Seconds by sequences and rows of each."""
        self._timed: dict[tuple[int, int], float] = {}
        """Seconds by size."""

    def run(self) -> list[CostPoint]:
        """See ``calibrate``."""
        for count, amount in self._plan.sizes:
            if not self._timed:
                self._take_in_first()
            elif self._foreseen(count, amount) > self._deadline - self._clock():
                continue
            self._open(count)
            self._timed[count, amount] = self._time(count, amount)
        # One amount alone says nothing of how the time grows with it; other sequences' times do.
        amounts = Counter(count for count, _ in self._timed)
        telling = [size for size in self._timed if amounts[size[0]] > 1] or self._timed
        return [CostPoint(*size, _smoothed(self._timed, *size)) for size in telling]

    def _foreseen(self, count: int, amount: int) -> float:
        """Seconds at most until a size has been timed once."""
        seconds = (self._engine.runner.slow_calls + 1) * _at_most(self._timed, count, amount)
        lacking = count - len(self._opened)
        if lacking > 0 and self._taken_in:
            seconds += _at_most(self._taken_in, lacking, self._base_len)
        return seconds

    def _take_in_first(self) -> None:
        """Opens a sequence and takes its prompt in, but for the pending token, in pieces that grow:
        where that takes long, the prompt stays short."""
        opened, tokens = self._new()
        self._opened.append((opened, tokens))
        until = self._clock() + PROMPT_SHARE * self._seconds
        while (left := self._plan.prompt - 1 - self._base_len) > 0 and self._clock() < until:
            begin, rows = self._base_len, min(max(1, self._base_len), left)
            item = self._engine.trial(opened, begin, tokens[begin : begin + rows], 0)
            self._taken_in[1, rows] = self._round([item])
            self._base_len += rows

    def _open(self, count: int) -> None:
        """Has ``count`` sequences open, with as much taken in as the first one."""
        lacking = [self._new() for _ in range(count - len(self._opened))]
        if lacking and self._base_len:
            items = [
                self._engine.trial(opened, 0, tokens[: self._base_len], 0)
                for opened, tokens in lacking
            ]
            self._taken_in[len(lacking), self._base_len] = self._round(items)
        self._opened += lacking

    def _new(self) -> tuple[OpenSequence, list[int]]:
        opened = OpenSequence(next(self._ids), 1, self._plan.capacity, Decoding())
        self._session.open(opened)
        vocab_size = max(1, self._engine.runner.facts.vocab_size)
        return opened, [self._random.randrange(vocab_size) for _ in range(self._plan.capacity)]

    def _time(self, count: int, amount: int) -> float:
        """Seconds of a round, the lower quartile of a few; one of them however late it is."""
        items = [
            self._engine.trial(opened, self._base_len, tokens[self._base_len :], amount)
            for opened, tokens in self._opened[:count]
        ]
        began = self._clock()
        for _ in range(self._engine.runner.slow_calls):
            self._round(items)
        slow = self._clock() - began
        while self._engine.runner.between():
            pass  # as it will be for users, later
        captured = self._clock() - began - slow
        until = self._clock() + SIZE_SHARE * self._seconds
        seconds = [self._round(items)]
        # A user would wait for what is compiled here; of the time for timing it takes nothing.
        compiled = slow - SLOW_TIMES * self._engine.runner.slow_calls * seconds[0]
        spare = min(max(0.0, compiled) + captured, self._spare)
        if spare > 0:
            self._spare -= spare
            self._deadline += spare
        while len(seconds) < REPEATS and (now := self._clock()) < until:
            if now + seconds[-1] > self._deadline:
                break
            seconds.append(self._round(items))
        return sorted(seconds)[len(seconds) // 4]

    def _round(self, items: Sequence[Any]) -> float:
        """Seconds of a round. Raises ``OutriderError``."""
        alone = self._engine.trial_alone(self._session, items)
        if alone is not None:
            return alone
        began = self._clock()
        refusals = self._session.round(items).refusals
        seconds = self._clock() - began
        if refusals:
            raise OutriderError(f"a round of {len(items)} sequences: {refusals[0].message}")
        on_device = self._engine.runner.device_seconds()
        return seconds if on_device is None else on_device


def _smoothed(took: Mapping[tuple[int, int], float], count: int, amount: int) -> float:
    """Seconds of a round that was timed, but no more than a larger one took: whatever disturbed it
    for longer than a median can forgive, a core that another program had, is no cost of it."""
    return min(
        seconds
        for (other_count, other_amount), seconds in took.items()
        if other_count >= count and other_amount >= amount
    )


def _at_most(took: Mapping[tuple[int, int], float], count: int, amount: int) -> float:
    """Seconds that a round takes at most, by what others took: a smaller one takes no longer, a
    larger one no longer than in proportion."""
    return min(
        seconds * max(1.0, count / known_count) * max(1.0, amount / known_amount)
        for (known_count, known_amount), seconds in took.items()
    )
