"""Slots, positions and masks by brute force, against the arena's arithmetic."""

from __future__ import annotations

import pytest
import torch

from outrider.shared.kv.arena import Arena, PoolPlan
from outrider.shared.model.attention import visibility


def ring_survives(size: int, window: int, slack: int, steps: int = 14) -> bool:
    """Whether no legal course of forwards and rollbacks ever reads an overwritten slot.

    Explores all courses: a forward of 1 … slack rows, then a rollback to anywhere behind its
    first row. Knows nothing of valid lengths or high-water marks: a slot is what was last put
    there.
    """
    start = (0, (-1,) * size)
    seen, todo = {start}, [start]
    while todo:
        length, slots = todo.pop()
        for rows in range(1, slack + 1):
            held = list(slots)
            for position in range(length, length + rows):
                held[position % size] = position
            for row in range(length, length + rows):
                for position in range(max(0, row - window + 1), row + 1):
                    if held[position % size] != position:
                        return False
            for kept in range(length, length + rows + 1):
                state = (kept, tuple(held))
                if kept <= steps and state not in seen:
                    seen.add(state)
                    todo.append(state)
    return True


@pytest.mark.parametrize("window", [1, 2, 3, 5])
@pytest.mark.parametrize("slack", [1, 2, 3])
def test_ring_survives_every_legal_rollback(window: int, slack: int) -> None:
    size = PoolPlan(1000, window=window, slack=slack).place_size(1000)
    assert size == window + slack
    assert ring_survives(size, window, slack)


@pytest.mark.parametrize("window", [2, 3, 5])
@pytest.mark.parametrize("slack", [1, 2, 3])
def test_ring_two_slots_smaller_does_not(window: int, slack: int) -> None:
    assert ring_survives(window + slack - 1, window, slack)
    assert not ring_survives(window + slack - 2, window, slack)


@pytest.mark.parametrize("window", [None, 1, 2, 5, 9])
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("prefix", [0, 3])
def test_masks_slots_and_positions_agree(window: int | None, rows: int, prefix: int) -> None:
    """Every row sees exactly what it may, each in the slot where it was written."""
    capacity, slack = 31, 4
    arena = Arena([PoolPlan(200, window=window, slack=0 if window is None else slack)])
    arena.admit(7)  # so that the extent does not start at slot 0
    memory: dict[int, int] = {}
    extent = arena.admit(capacity)
    start = 0
    while start + rows <= capacity:
        if prefix and start >= prefix and extent.parent is None:
            extent = arena.branch(extent, start, capacity)
        arena.check_write(extent, start, rows)
        position = start
        for part in arena.segments(extent, 0, start, start + rows):
            for slot in range(part.slot, part.slot + part.count):
                memory[slot] = position
                position += 1
        first = arena.first_read(0, start)
        listed = [
            memory[slot]
            for part in arena.segments(extent, 0, first, start + rows)
            for slot in range(part.slot, part.slot + part.count)
        ]
        mask = visibility(
            rows, start, first, window=window, dtype=torch.float32, device=torch.device("cpu")
        )
        if mask is None:
            mask = torch.zeros(rows, len(listed))
        assert mask.shape == (rows, len(listed))
        for row in range(rows):
            seen = [p for p, hidden in zip(listed, mask[row].tolist(), strict=True) if hidden == 0]
            own = start + row
            assert seen == list(range(0 if window is None else max(0, own - window + 1), own + 1))
        extent.advance(start + rows)
        start += rows
