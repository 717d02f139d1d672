"""K against simulated machines: near the best fixed K, and never far below plain decoding."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from outrider.coordinator.requests.acceptance_rate import PRIOR, Acceptance
from outrider.coordinator.rounds.choose_k import Speculable, Speculation
from outrider.coordinator.rounds.costs import Curve


@dataclass
class Machine:
    """Seconds of a round: linear in K and rows, with reproducible jitter and pauses."""

    draft_base: float = 0.2e-3
    draft_each: float = 1.0e-3
    verify_base: float = 5.0e-3
    verify_row: float = 0.1e-3
    jitter: float = 0.05
    pause_every: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(1)
        self.rounds = 0

    def _noisy(self, seconds: float) -> float:
        pause = 20.0 if self.pause_every and self.rounds % self.pause_every == 0 else 1.0
        return seconds * (1 + self.jitter * self.rng.random()) * pause

    def draft(self, k: int) -> float:
        return self._noisy(self.draft_base + self.draft_each * k) if k else 0.0

    def verify(self, rows: int) -> float:
        self.rounds += 1
        return self._noisy(self.verify_base + self.verify_row * rows)


def accepted(rng: random.Random, k: int, alpha: float) -> int:
    count = 0
    while count < k and rng.random() < alpha:
        count += 1
    return count


def run(
    machine: Machine,
    alpha: Callable[[int], float],
    rounds: int,
    *,
    fixed: int | None = None,
    batch: int = 1,
    controller: Speculation | None = None,
) -> tuple[float, list[int]]:
    """Tokens per second, and the K of each round."""
    control = controller or Speculation(16)
    rng = random.Random(2)
    ways = [Acceptance(control.acceptance) for _ in range(batch)]
    tokens, seconds, chosen = 0, 0.0, []
    for number in range(rounds):
        ks = control.choose([Speculable(way, 100, fixed) for way in ways])
        counts = [accepted(rng, k, alpha(number)) for k in ks]
        for way, k, count in zip(ways, ks, counts, strict=True):
            way.observe(k, count)
        rows = sum(k + 1 for k in ks)
        draft, verify = machine.draft(max(ks)), machine.verify(rows)
        control.observe(batch, max(ks), rows, draft, verify)
        tokens += sum(counts) + batch
        seconds += draft + verify
        chosen.append(max(ks))
    return tokens / seconds, chosen


def best_fixed(machine: Callable[[], Machine], alpha: float, batch: int = 1) -> tuple[float, int]:
    return max(
        (run(machine(), lambda _: alpha, 800, fixed=k, batch=batch)[0], k) for k in range(13)
    )


@pytest.mark.parametrize("alpha", [0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("draft_each", [0.1e-3, 0.7e-3, 2.0e-3])
def test_speculation_adaptive_comes_near_the_best_fixed_k(alpha: float, draft_each: float) -> None:
    def machine() -> Machine:
        return Machine(draft_each=draft_each)

    best, k = best_fixed(machine, alpha)
    rate, chosen = run(machine(), lambda _: alpha, 3000)
    assert rate >= 0.95 * best, (k, sorted(chosen)[len(chosen) // 2])


@pytest.mark.parametrize("batch", [4, 32])
def test_speculation_adaptive_comes_near_the_best_fixed_k_in_batches(batch: int) -> None:
    def machine() -> Machine:
        return Machine(verify_row=0.25e-3)  # many rows begin to cost

    best, _ = best_fixed(machine, 0.7, batch)
    rate, _ = run(machine(), lambda _: 0.7, 2000, batch=batch)
    assert rate >= 0.94 * best


@pytest.mark.parametrize(
    ("alpha", "draft_each"), [(0.0, 1e-3), (0.2, 3e-3), (0.6, 5.5e-3), (0.9, 20e-3)]
)
def test_speculation_steps_aside_where_it_does_not_pay(alpha: float, draft_each: float) -> None:
    plain, _ = run(Machine(draft_each=draft_each), lambda _: alpha, 4000, fixed=0)
    rate, chosen = run(Machine(draft_each=draft_each), lambda _: alpha, 4000)
    assert rate >= 0.97 * plain
    assert sum(k > 0 for k in chosen[1000:]) < 0.1 * 3000


def test_speculation_probes_again_and_comes_back() -> None:
    # The draft is useless for a while, then good.
    _, chosen = run(Machine(), lambda number: 0.0 if number < 1500 else 0.9, 4000)
    assert sum(k > 0 for k in chosen[500:1500]) < 100
    assert sorted(chosen[3000:])[500] >= 3


def test_speculation_gives_up_when_acceptance_falls() -> None:
    control = Speculation(16)
    run(Machine(draft_each=3e-3), lambda _: 0.95, 1000, controller=control)
    assert control.k > 0
    run(Machine(draft_each=3e-3), lambda _: 0.05, 1000, controller=control)
    assert control.k == 0


def test_speculation_pauses_of_the_machine_do_not_mislead() -> None:
    def machine() -> Machine:
        return Machine(pause_every=37)

    best, _ = best_fixed(machine, 0.8)
    rate, _ = run(machine(), lambda _: 0.8, 3000)
    assert rate >= 0.93 * best


def test_speculation_is_deterministic() -> None:
    assert run(Machine(), lambda _: 0.7, 500) == run(Machine(), lambda _: 0.7, 500)


def test_speculation_fixed_k_is_kept_and_limits_hold() -> None:
    control = Speculation(8)
    way = control.acceptance
    for _ in range(200):
        ks = control.choose(
            [
                Speculable(way, 100, 5),
                Speculable(way, 2, 5),
                Speculable(way, 0, 5),
                Speculable(way, -1, 3),
                Speculable(way, 3, None),
            ]
        )
        assert ks[:4] == [5, 2, 0, 0]
        assert 0 <= ks[4] <= 3
        control.observe(5, max(ks), sum(ks) + 5, 1e-3, 5e-3)
    control.max_k = 3  # a service came back with less
    assert control.choose([Speculable(way, 100, 5)]) == [3]


def test_speculation_plain_requests_never_want_the_draft() -> None:
    control = Speculation(8)
    assert not control.wanted(0)
    assert control.wanted(3)
    assert control.wanted(None)


def test_acceptance_estimates_each_position() -> None:
    way = Acceptance()
    assert way.rate(0) == PRIOR
    rng = random.Random(3)
    chances = [0.9, 0.5, 0.8]
    for _ in range(4000):
        count = 0
        while count < 3 and rng.random() < chances[count]:
            count += 1
        way.observe(3, count)
    for position, chance in enumerate(chances):
        assert way.rate(position) == pytest.approx(chance, abs=0.12)
    assert way.rate(7) == way.rate(2)
    assert way.survival(2) == pytest.approx([way.rate(0), way.rate(0) * way.rate(1)])


def test_acceptance_new_sequences_start_from_what_others_showed() -> None:
    everyone = Acceptance(floor=0.01)
    one = Acceptance(everyone)
    for _ in range(50):
        one.observe(2, 2)
    assert Acceptance(everyone).rate(0) > 0.95


def test_curve_interpolates_between_points_and_is_hopeful_beyond() -> None:
    curve = Curve()
    assert curve.at(3) is None
    curve.add(2, 4.0, 1)
    assert curve.at(2) == curve.at(9) == curve.at(1) == 4.0
    curve.add(6, 8.0, 2)
    assert curve.at(3) == 5.0
    assert curve.at(8) == 10.0
    assert curve.at(1) == 3.0
    for seconds in (4.1, 4.2, 90.0):
        curve.add(2, seconds, 3)
    assert curve.at(2) == pytest.approx(4.1)  # one outlier changes nothing
