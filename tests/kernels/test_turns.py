"""Turns on the device, ``take`` → ``accept`` → ``settle`` → ``follow``, against lists."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.kernels import accept, follow, registry, settle, take
from outrider.kernels.operation import Call, Tools
from outrider.shared.link.device import mailbox

CPU = torch.device("cpu")
STEPS = 4
WIDTH = STEPS + 1
VOCABULARY = 3  # chance agreement is common: every length of the accepted prefix occurs
OPEN, OVER = mailbox.bell(5, 3), mailbox.bell(5, mailbox.ENDED)


@dataclass
class Lane:
    """One sequence as lists: what speculative decoding means."""

    log: list[int]
    room: int
    k: int
    breaks: int
    """Turn from which on the base's rows are not finite."""
    proposal: list[int] = field(default_factory=list)
    held: dict[int, int] = field(default_factory=dict)
    """Token by position of the draft's KV."""

    def __post_init__(self) -> None:
        self.limit = len(self.log) + self.room
        self.broken = False

    @property
    def finished(self) -> bool:
        return len(self.log) >= self.limit

    @property
    def wants(self) -> int:
        """Tokens worth proposing: the base writes one itself."""
        return max(0, min(self.k, self.limit - len(self.log) - 1))

    def draws(self, random: Random) -> list[int]:
        """What the draft chooses in all steps; beyond what it is asked for, nobody looks."""
        drawn = [random.randrange(VOCABULARY) for _ in range(STEPS)]
        if random.random() < 0.1:
            drawn[random.randrange(STEPS)] = -1
        self.proposal = drawn[: self.wants]
        if -1 in self.proposal:
            self.proposal = self.proposal[: self.proposal.index(-1)]
        for j in range(self.wants - 1):
            self.held[len(self.log) + j] = max(0, drawn[j])
        return drawn

    def judged(self, choices: list[int]) -> tuple[int, int, int, int]:
        """The slot after the base chose ``choices``, one after each row."""
        if self.finished:
            return 0, 0, len(self.log), 0
        accepted = 0
        while accepted < len(self.proposal) and choices[accepted] == self.proposal[accepted]:
            accepted += 1
        token = choices[accepted]
        if token < 0:
            self.broken = True
            return accepted, token, len(self.log), 0
        self.log += [*self.proposal[:accepted], token]
        return accepted, token, len(self.log), int(not self.finished)


class State:
    """The tensors of both sides, and the implementations that work on them."""

    def __init__(self, lanes: list[Lane], calls: dict[str, Call]) -> None:
        self.count, self.calls = len(lanes), calls

        def ints(*shape: int) -> torch.Tensor:
            return torch.full(shape, -9, dtype=torch.int32)

        def each(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32)

        self.bell = torch.tensor([OPEN])
        self.limits, self.ks = each([x.limit for x in lanes]), each([x.k for x in lanes])
        self.slots, self.proposals = ints(64, 4), ints(64, STEPS)
        self.committed = each([len(x.log) for x in lanes])
        self.pending = each([x.log[-1] for x in lanes])
        self.draft_pending = self.pending.clone()
        self.rows, self.noise = ints(WIDTH * self.count), ints(WIDTH * self.count)
        self.positions, self.row_counts, self.proposed = ints(64), ints(64), ints(64)
        self.verdicts, self.seen = ints(64, 2), ints(64, 4)
        self.chosen, self.active = ints(STEPS, 64), ints(STEPS, 64)
        self.draft_rows, self.draft_noise = ints(2 * self.count), ints(64)
        self.draft_positions, self.draft_counts = ints(64), ints(64)

    def propose(self, drawn: list[list[int]]) -> None:
        """The draft's tokens of all steps, as its forwards and the copy to the mailbox leave it."""
        self.chosen[:, : self.count] = torch.tensor(drawn, dtype=torch.int32).T
        self.proposals[: self.count] = self.chosen[:, : self.count].T

    def take(self) -> None:
        self.calls["take"](
            bell=self.bell, proposals=self.proposals, committed=self.committed,
            pending=self.pending, limits=self.limits, ks=self.ks, tokens=self.rows,
            positions=self.positions, noise_positions=self.noise, row_counts=self.row_counts,
            proposed=self.proposed, width=WIDTH, count=self.count,
        )  # fmt: skip

    def settle(self, choices: list[list[int]]) -> None:
        firsts = torch.arange(self.count, dtype=torch.int32) * WIDTH
        accept.reference(
            chosen=torch.tensor(choices, dtype=torch.int32).flatten(), tokens=self.rows,
            pending=firsts, proposed=self.proposed[: self.count],
            verdicts=self.verdicts[: self.count],
        )  # fmt: skip
        self.calls["settle"](
            verdicts=self.verdicts, committed=self.committed, pending=self.pending,
            row_counts=self.row_counts, limits=self.limits, slots=self.slots, count=self.count,
        )  # fmt: skip

    def follow(self) -> None:
        self.calls["follow"](
            bell=self.bell, slots=self.slots, chosen=self.chosen, pending=self.draft_pending,
            ks=self.ks, limits=self.limits, tokens=self.draft_rows,
            positions=self.draft_positions, noise_positions=self.draft_noise,
            row_counts=self.draft_counts, active=self.active, seen=self.seen, count=self.count,
        )  # fmt: skip


def check_taken(state: State, lanes: list[Lane]) -> None:
    rows, noise = state.rows.view(-1, WIDTH).tolist(), state.noise.view(-1, WIDTH).tolist()
    for s, lane in enumerate(lanes):
        n = len(lane.log)
        if lane.finished:
            assert rows[s] == noise[s] == [0] * WIDTH
            assert state.positions[s] == state.row_counts[s] == state.proposed[s] == 0
            continue
        fed = [lane.log[-1], *lane.proposal]
        assert state.row_counts[s] == len(fed) == state.proposed[s] + 1
        assert rows[s][: len(fed)] == fed and min(rows[s]) >= 0
        assert state.positions[s] == n - 1
        assert noise[s] == list(range(n, n + WIDTH))
        assert n + len(lane.proposal) < lane.limit


def check_settled(state: State, lanes: list[Lane], slots: list[tuple[int, int, int, int]]) -> None:
    assert state.slots[: state.count].tolist() == [list(slot) for slot in slots]
    assert state.committed.tolist() == [len(lane.log) for lane in lanes]
    assert state.pending.tolist() == [lane.log[-1] for lane in lanes]
    assert all(len(lane.log) <= lane.limit for lane in lanes)


def check_followed(state: State, lanes: list[Lane]) -> None:
    assert torch.equal(state.seen[: state.count], state.slots[: state.count])
    for s, lane in enumerate(lanes):
        n, rows = len(lane.log), state.draft_rows[2 * s : 2 * s + 2].tolist()
        active = state.active[:, s].tolist()
        if lane.finished or lane.broken:
            assert rows == [0, 0] and not any(active)
            assert state.draft_counts[s] == state.draft_positions[s] == state.draft_noise[s] == 0
            continue
        assert rows == lane.log[-2:] and state.draft_counts[s] == 2
        assert state.draft_positions[s] == n - 2 and state.draft_noise[s] == n
        assert active == [1] * lane.wants + [0] * (STEPS - lane.wants)
        assert state.draft_pending[s] == lane.log[-1]
        # With these two rows the draft has the KV of the whole log and of nothing else.
        lane.held |= {n - 2: rows[0], n - 1: rows[1]}
        assert [lane.held.get(p) for p in range(n)] == lane.log


def play(lanes: list[Lane], turns: int, random: Random, states: list[State]) -> None:
    for lane in lanes:
        lane.held = dict(enumerate(lane.log))
    for turn in range(turns):
        drawn = [lane.draws(random) for lane in lanes]
        choices = []
        for lane in lanes:
            own = [random.randrange(VOCABULARY) for _ in range(WIDTH)]
            if turn >= lane.breaks:
                first = 0 if lane.broken else random.randrange(WIDTH)
                own[first:] = [-1] * (WIDTH - first)
            choices.append(own)
        for state in states:
            state.propose(drawn)
            state.take()
            check_taken(state, lanes)
        slots = [lane.judged(own) for lane, own in zip(lanes, choices, strict=True)]
        for state in states:
            state.settle(choices)
            check_settled(state, lanes, slots)
            state.follow()
            check_followed(state, lanes)


def check_over(state: State, lanes: list[Lane]) -> None:
    """After the grant's end a turn changes nothing."""
    state.bell.fill_(OVER)
    before = state.draft_pending.clone()
    state.follow()  # the last slots still go on
    check_draft_rests(state)
    assert torch.equal(state.draft_pending, before)
    assert torch.equal(state.seen[: state.count, :3], state.slots[: state.count, :3])
    state.take()
    assert not state.row_counts[: state.count].any() and not state.rows.any()
    state.settle([[0] * WIDTH for _ in lanes])
    check_settled(state, lanes, [(0, 0, len(lane.log), 0) for lane in lanes])
    state.follow()
    check_draft_rests(state)


def check_draft_rests(state: State) -> None:
    own = slice(state.count)
    assert not state.seen[own, 3].any() and not state.draft_rows.any()
    assert not state.draft_counts[own].any() and not state.active[:, own].any()
    assert not state.draft_positions[own].any() and not state.draft_noise[own].any()


LANES = st.builds(
    Lane,
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=3),
    st.integers(0, 12),
    st.integers(0, STEPS),
    st.integers(0, 30),
)


@settings(max_examples=25, deadline=None)
@given(
    lanes=st.one_of(
        st.lists(LANES, min_size=1, max_size=8), st.lists(LANES, min_size=64, max_size=64)
    ),
    turns=st.integers(1, 8),
    seed=st.integers(0, 1 << 32),
)
def test_turns_are_speculative_decoding(emulated, lanes, turns, seed):
    operations = {name: registry.operations()[name] for name in ("take", "settle", "follow")}
    tools = Tools(CPU, emulated(90))
    kernels = {name: one.implementations[0].build(tools) for name, one in operations.items()}
    references = {name: one.reference for name, one in operations.items()}
    states = [State(lanes, references), State(lanes, kernels)]
    play(lanes, turns, Random(seed), states)
    for state in states:
        check_over(state, lanes)
    for name, value in vars(states[0]).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(states[1], name)), name


@pytest.mark.parametrize("module", [take, settle, follow])
def test_reference_reads_nothing_back_from_the_device(module):
    # A tensor without data can't say what a host would have to wait for.
    for case in module.OPERATION.cases(CPU, torch.float16):
        bare = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in case.items()}
        module.reference(**bare)


def test_the_bell_that_ends_a_grant_is_the_mailbox_s():
    assert take.ENDED == mailbox.ENDED
