"""The mailbox in device memory: where things stand, and who can prove what."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.shared.link.device.mailbox import (
    ENDED,
    MOST_GRANTS,
    DeviceLayout,
    DeviceMailbox,
    DeviceRegion,
    bell,
)


def region(sequences: int = 3, k: int = 4) -> tuple[torch.Tensor, DeviceRegion]:
    layout = DeviceLayout(sequences, k)
    memory = torch.randint(0, 255, (layout.size,), dtype=torch.uint8)
    return memory, DeviceRegion(memory, layout)


def test_region_has_its_fields_where_they_are_documented() -> None:
    memory, one = region(3, 4)
    one.format(0x0123456789ABCDEF)
    raw = memory.numpy()
    assert raw[:8].tobytes() == bytes.fromhex("efcdab8967452301") and not raw[8:].any()
    one.bell.fill_(bell(2, 5))
    one.verdicts.copy_(torch.arange(12, dtype=torch.int32).view(3, 4))
    one.proposals.copy_(100 + torch.arange(12, dtype=torch.int32).view(3, 4))
    assert raw[128:136].view("<i8")[0] == 2 << 32 | 5
    assert raw[512:560].view("<i4").tolist() == list(range(12))
    assert raw[576:624].view("<i4").tolist() == list(range(100, 112))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 64), st.integers(1, 64))
def test_region_fields_do_not_overlap(sequences: int, k: int) -> None:
    memory, one = region(sequences, k)
    memory.zero_()
    fields = (one.bell, one.verdicts, one.proposals)
    for field in fields:
        field.fill_(-1)
    written = sum(field.numel() * field.element_size() for field in fields)
    assert int((memory == 255).sum()) == written


@given(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1))
@settings(max_examples=50, deadline=None)
def test_region_is_proven_by_the_answer_to_its_own_canary(canary: int, other: int) -> None:
    memory, mine = region()
    mine.format(canary)
    assert not mine.proven(canary)
    DeviceRegion(memory, mine.layout).prove()
    assert mine.proven(canary)
    assert mine.proven(other) == (other == canary)


def test_region_of_another_size_or_type_is_refused() -> None:
    layout = DeviceLayout(3, 4)
    for memory in (torch.zeros(layout.size - 1, dtype=torch.uint8), torch.zeros(layout.size)):
        with pytest.raises(ValueError, match="memory: got"):
            DeviceRegion(memory, layout)


def test_mailbox_sides_read_what_the_other_writes() -> None:
    layout = DeviceLayout(2, 3)
    verifiers, drafts = torch.zeros(2, layout.size, dtype=torch.uint8)
    verify = DeviceMailbox(DeviceRegion(verifiers, layout), DeviceRegion(drafts, layout), "verify")
    draft = DeviceMailbox(DeviceRegion(drafts, layout), DeviceRegion(verifiers, layout), "draft")
    draft.proposals.fill_(7)
    draft.rung.fill_(1)
    assert verify.proposals.tolist() == [[7] * 3] * 2 and verify.heard.item() == 1
    assert draft.heard.item() == 0
    verify.verdicts.fill_(9)
    verify.rung.fill_(2)
    assert draft.verdicts.tolist() == [[9] * 4] * 2 and draft.heard.item() == 2
    # Each side reads its own memory and writes the other's.
    assert verifiers.any() and drafts.any()
    drafts.zero_()
    assert verify.heard.item() == 1 and draft.verdicts.sum() == 0


@given(
    st.tuples(st.integers(0, MOST_GRANTS - 1), st.integers(0, ENDED)),
    st.tuples(st.integers(0, MOST_GRANTS - 1), st.integers(0, ENDED)),
)
def test_bell_rises_over_turns_and_grants(one: tuple[int, int], other: tuple[int, int]) -> None:
    assert (bell(*one) < bell(*other)) == (one < other)
    assert 0 <= bell(*one) < 1 << 63


def test_bell_of_a_grant_out_of_range_is_refused() -> None:
    for grant in (-1, MOST_GRANTS):
        with pytest.raises(ValueError, match="grant: got"):
            bell(grant, 0)
