"""What a round costs: measured by the services at their start, corrected by the rounds that run.

Each service times its own engine when it starts (``shared/rounds/calibration.py``) and tells
seconds over (sequences, amount), where the amount is what each sequence has in a round: for the
verifier its rows, 1 + K, for the draft K. Between the measured points times are linear, beyond
them they go on as they did. Real rounds take longer: contexts grow, messages travel, the machine
has other work. So each prediction is multiplied by what rounds of its kind took lately over what
was predicted for them:

    seconds(sequences, K) = measured(sequences, amount) * ratio(size of the batch, K)

The ratio of a kind that has not run, or not for long, is that of the kind nearest to it. Pure
Python.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median_low

SAMPLES = 7
"""Ratios kept per kind of round."""
FADE_ROUNDS = 256
"""Rounds after which a kind's ratio is worth half beside that of a kind that runs."""
NEAR = 1
"""Sizes of batches that say something of each other: twice as many sequences, or half."""
GUESS = ((1, 1, 1.0),)
"""Where nothing was measured: a verify of any size takes as long."""
GUESS_DRAFT = ((1, 1, 0.25),)
"""And a draft token a quarter of that."""

Point = tuple[int, float, float]
"""Sequences, amount of each, seconds."""


class Surface:
    """Seconds over (sequences, amount of each)."""

    def __init__(self, points: Iterable[Point], *, through_zero: bool = False) -> None:
        """``points``: at least one. ``through_zero``: nothing costs nothing, and where only one
        amount is known seconds are proportional to it."""
        rows: dict[int, dict[float, float]] = {}
        for sequences, amount, seconds in points:
            rows.setdefault(sequences, {})[amount] = seconds
        if through_zero:
            for row in rows.values():
                row[0.0] = 0.0
        self._sizes = sorted(rows)
        self._rows = [sorted(rows[size].items()) for size in self._sizes]

    def at(self, sequences: int, amount: float) -> float:
        """Seconds, >= 0."""
        sizes = self._sizes
        right = bisect_left(sizes, sequences)
        if right < len(sizes) and sizes[right] == sequences:
            return _line(self._rows[right], amount)
        right = min(max(right, 1), len(sizes) - 1)
        near = range(max(right - 1, 0), right + 1)
        return _line([(sizes[i], _line(self._rows[i], amount)) for i in near], sequences)


def _line(points: Sequence[tuple[float, float]], at: float) -> float:
    """Along ``points``; beyond them as between the outermost two, never falling. Seconds, >= 0."""
    if len(points) == 1:
        return points[0][1]
    right = min(max(bisect_left(points, (at,)), 1), len(points) - 1)
    (low, start), (high, end) = points[right - 1], points[right]
    slope = (end - start) / (high - low)
    if at > high:
        return end + max(0.0, slope) * (at - high)
    return max(0.0, start + slope * (at - low))


class _Kind:
    """What rounds of one kind took over what was predicted."""

    __slots__ = ("_ratios", "ratio", "seen_at")

    def __init__(self, guess: float) -> None:
        """``guess`` counts as a sample: the first round may have been a pause of the machine."""
        self._ratios: deque[float] = deque([guess], maxlen=SAMPLES)
        self.ratio = guess
        self.seen_at = 0

    @property
    def settled(self) -> bool:
        """Whether enough rounds ran for their ratio to be steady."""
        return len(self._ratios) == SAMPLES

    def add(self, ratio: float, now: int) -> None:
        self._ratios.append(ratio)
        self.ratio = median_low(self._ratios)
        self.seen_at = now


class Corrections:
    """Ratios by (size of the batch, K)."""

    def __init__(self, guess: float | None = None) -> None:
        """``guess``: the ratio to expect before anything ran; None: the first one that runs."""
        self._guess = guess
        self._kinds: dict[int, dict[int, _Kind]] = {}
        self._last: dict[int, _Kind] = {}
        """By size of the batch: the kind that ran last."""
        self._drift: dict[int, float] = {}
        """By size of the batch: what has become of rounds of other kinds since one of these ran."""

    def add(self, size: int, k: int, ratio: float, now: int) -> float:
        """What a round took over what was predicted for it; returns how much more that is than
        rounds of its kind took before, as far as enough of them ran to say so."""
        kind = self._kinds.get(size, {}).get(k)
        if kind is None:
            guess = self.at(size, k, now)
            if guess is None:
                guess = self._guess
            kind = _Kind(ratio if guess is None else guess)
            self._kinds.setdefault(size, {})[k] = kind
        before = kind.ratio if kind.settled else 0.0
        kind.add(ratio, now)
        self._last[size] = kind
        self._drift.pop(size, None)
        return kind.ratio / before if before > 0 else 1.0

    def drift(self, size: int, factor: float) -> None:
        """Rounds of other kinds take ``factor`` as long as before: contexts have grown, or the
        machine has other work. These would, too."""
        self._drift[size] = self._drift.get(size, 1.0) * factor

    def near(self, size: int) -> bool:
        """Whether anything is known of batches of about that size."""
        return any(abs(other - size) <= NEAR for other in self._kinds)

    def at(self, size: int, k: int, now: int) -> float | None:
        """The ratio to expect; None where nothing of the kind is known."""
        if not self._kinds:
            return None
        near = min(self._kinds, key=lambda other: (abs(other - size), other))
        kinds = self._kinds[near]
        kind = kinds[min(kinds, key=lambda other: (abs(other - k), other))]
        last, drift = self._last[near], self._drift.get(near, 1.0)
        if kind is last or kind.ratio <= 0 or last.ratio <= 0:
            return kind.ratio * drift
        weight = 0.5 ** ((now - kind.seen_at) / FADE_ROUNDS)
        worth: float = kind.ratio**weight * last.ratio ** (1 - weight)
        return worth * drift


class Costs:
    """Seconds of rounds: of the draft's part, and of all the rest."""

    def __init__(self) -> None:
        self._round = 0
        self._changes: deque[float] = deque(maxlen=SAMPLES)
        self.calibrate((), ())

    def calibrate(self, verify: Iterable[Point], draft: Iterable[Point]) -> None:
        """What the services measured; either may be empty. Corrections begin anew."""
        verify, draft = list(verify), list(draft)
        self.measured = bool(verify) and bool(draft)
        """Whether both services have told what they measured."""
        if not self.measured:
            verify, draft = list(GUESS), list(GUESS_DRAFT)
        self._verify, self._draft = Surface(verify), Surface(draft, through_zero=True)
        # Rounds without a draft run in another way than those with one, and are no guide to
        # each other where both are known.
        guess = 1.0 if self.measured else None
        self._alone, self._drafted, self._drafting = (Corrections(guess) for _ in range(3))

    def observe(
        self, sequences: int, drafted: int, k: int, rows: int, draft: float, rest: float
    ) -> None:
        """A round of ``sequences``, ``drafted`` of which were to have up to ``k`` tokens proposed,
        with ``rows`` in all, took the draft ``draft`` seconds and ``rest`` besides."""
        self._round += 1
        size = size_of(sequences)
        foretold = self._verify.at(sequences, rows / sequences)
        which, other = self._drafted, self._alone
        if not k:
            which, other = other, which
        if foretold > 0:
            other.drift(size, which.add(size, k, rest / foretold, self._round))
        if k:
            foretold = self._draft.at(drafted, k)
            if foretold > 0:
                self._drafting.add(size, k, draft / foretold, self._round)

    def observe_change(
        self, sequences: int, drafted: int, k: int, rows: int, seconds: float
    ) -> None:
        """Such a round, the first after what the services run by themselves was changed, was over
        ``seconds`` after the one before it."""
        draft, rest = self.factors(sequences, k)
        foretold = rest[k] * self.rest_seconds(sequences, rows)
        if k:
            foretold += draft[k] * self.draft_seconds(drafted, k)
        self._changes.append(max(0.0, seconds - foretold))

    def change_seconds(self, plain: float) -> float:
        """What a change costs beside the rounds; ``plain``: seconds of a round without a draft,
        which are the guess where nothing was changed yet."""
        guess = [plain] if len(self._changes) < 2 else []
        return median_low([*self._changes, *guess])

    def knows_plain(self, sequences: int) -> bool:
        """Whether rounds without a draft were timed at the start, or ran with about so many
        sequences."""
        return self.measured or self._alone.near(size_of(sequences))

    def factors(self, sequences: int, top: int) -> tuple[list[float], list[float]]:
        """What measured times are to be multiplied by, for K = 0 … ``top``: of the draft's part,
        and of the rest."""
        size, now = size_of(sequences), self._round
        alone = self._alone.at(size, 0, now)
        rest = [1.0 if alone is None else alone]
        draft = [1.0]
        for k in range(1, top + 1):
            own = self._drafted.at(size, k, now)
            known = own if own is not None else rest[0]
            if k == 1 and alone is None:
                rest[0] = known
            rest.append(known)
            drafting = self._drafting.at(size, k, now)
            draft.append(drafting if drafting is not None else known)
        return draft, rest

    def draft_seconds(self, drafted: int, k: int) -> float:
        """As measured at the start: proposals of ``k`` for ``drafted`` sequences."""
        return self._draft.at(drafted, k)

    def rest_seconds(self, sequences: int, rows: int) -> float:
        """As measured at the start: a verify of ``rows`` in all."""
        return self._verify.at(sequences, rows / sequences)


def size_of(batch: int) -> int:
    """Batches of 1, 2, 3-4, 5-8, ... are of one size."""
    return (max(1, batch) - 1).bit_length()
