"""The mailbox's memory: what is written is read again, and nothing else ever is."""

from __future__ import annotations

import mmap
import struct
import zlib
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.shared.core.errors import ProtocolError
from outrider.shared.core.types import Proposal, SparseRow
from outrider.shared.link import mailbox as mailbox_module
from outrider.shared.link.mailbox import (
    BEATS,
    BELLS,
    ENDS,
    LAYOUT,
    PREPARED,
    Judgement,
    Layout,
    Mailbox,
    ProposalHead,
    VerdictHead,
    layout_of,
)

SMALL = Layout(4, 5, 6)
U32, U64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
SECONDS = st.floats(0, 1e6)
FLOATS = st.floats(0, 1, width=32)


def fresh(layout: Layout = SMALL) -> tuple[Any, Mailbox]:
    memory = mmap.mmap(-1, layout.size)
    return memory, Mailbox(memory, layout)


@st.composite
def rows(draw: st.DrawFn, most: int) -> SparseRow:
    entries = draw(st.lists(st.tuples(U32, FLOATS), max_size=most))
    return SparseRow(tuple(i for i, _ in entries), tuple(p for _, p in entries))


@st.composite
def turns(draw: st.DrawFn, layout: Layout = SMALL) -> tuple[ProposalHead, list[Proposal]]:
    """The draft's turn, of any size that ``layout`` has room for."""
    made = []
    for _ in range(draw(st.integers(0, layout.max_sequences))):
        tokens = tuple(draw(st.lists(U32, max_size=layout.max_k)))
        weights = tuple(
            draw(rows(layout.row_entries)) for _ in tokens if draw(st.booleans())
        )  # fewer rows than tokens are carried just as well
        made.append(Proposal(draw(U64), draw(U32), draw(U32), tokens, weights))
    head = ProposalHead(draw(U64), draw(U32), draw(U32), draw(U32), draw(SECONDS), draw(SECONDS))
    return head, made


@st.composite
def judgements(draw: st.DrawFn) -> tuple[VerdictHead, list[Judgement]]:
    one = st.builds(Judgement, U64, U32, U32, U32, U32, U32)
    return (
        VerdictHead(draw(U64), draw(U32), draw(U32)),
        draw(st.lists(one, max_size=SMALL.max_sequences)),
    )


@settings(max_examples=60, deadline=None)
@given(turns(), judgements(), turns())
def test_mailbox_gives_back_what_was_written(
    first: tuple[ProposalHead, list[Proposal]],
    verdicts: tuple[VerdictHead, list[Judgement]],
    second: tuple[ProposalHead, list[Proposal]],
) -> None:
    _, mailbox = fresh()
    mailbox.write_proposals(*first)
    mailbox.write_verdicts(*verdicts)
    assert mailbox.read_proposals() == first
    assert mailbox.read_verdicts() == verdicts
    mailbox.write_proposals(*second)  # over what the first one left
    assert mailbox.read_proposals() == second
    assert mailbox.read_verdicts() == verdicts


def test_mailbox_full_to_the_last_entry_keeps_its_slots_apart() -> None:
    layout = Layout(3, 4, 5)
    _, mailbox = fresh(layout)
    top = (1 << 32) - 1
    row = SparseRow((top,) * 5, (0.5,) * 5)
    offered = [Proposal(i, top, top, (top,) * 4, (row,) * 4) for i in range(3)]
    judged = [Judgement((1 << 64) - 1, top, top, top, top, top)] * 3
    mailbox.format(77)
    mailbox.prove()
    mailbox.write_proposals(ProposalHead(1, 2, ENDS, top, 0.25, 0.5), offered)
    mailbox.write_verdicts(VerdictHead(1, 2, ENDS), judged)
    for offset in (*BEATS, *BELLS):
        mailbox.set_word(offset, (1 << 64) - 1)
    assert mailbox.read_proposals() == (ProposalHead(1, 2, ENDS, top, 0.25, 0.5), offered)
    assert mailbox.read_verdicts() == (VerdictHead(1, 2, ENDS), judged)
    assert mailbox.proven(77) and not mailbox.proven(78)


def test_mailbox_of_zeros_holds_nothing() -> None:
    _, mailbox = fresh()
    assert mailbox.read_proposals() is None
    assert mailbox.read_verdicts() is None
    assert not mailbox.proven(0)


TURN = (
    ProposalHead(7, 3, 0, 9, 0.5, 0.75),
    [
        Proposal(11, 1, 40, (5, 6, 7), tuple(SparseRow((i, 2), (0.25, 0.75)) for i in range(3))),
        Proposal(12, 2, 41, (), ()),
        Proposal(13, 1, 42, (1, 2, 3, 4, 5), ()),
    ],
)
VERDICTS = (
    VerdictHead(7, 3),
    [Judgement(11, 1, 2, 9, 43, 4), Judgement(13, 1, 0, 8, 43, 0)],
)


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_mailbox_with_any_byte_changed_is_not_read_as_something_else(flip: int) -> None:
    memory, mailbox = fresh()
    mailbox.write_proposals(*TURN)
    mailbox.write_verdicts(*VERDICTS)
    lost = 0
    for at in range(mailbox_module._SLOTS, SMALL.size):
        memory[at] ^= flip
        for read, wanted in ((mailbox.read_proposals, TURN), (mailbox.read_verdicts, VERDICTS)):
            try:
                found = read()
            except ProtocolError:
                found = None
            assert found is None or found == wanted, f"byte {at}"
            lost += found is None
        memory[at] ^= flip
    # Every byte that says anything is covered: seals, heads, bodies and rows.
    said = 2 * 4 + 40 + 3 * 24 + 8 * 4 + 3 * (4 + 2 * 8) + 20 + 2 * 28
    assert lost == said
    assert mailbox.read_proposals() == TURN


@settings(max_examples=60, deadline=None)
@given(turns(), turns(), st.data())
def test_mailbox_half_written_is_not_read(
    old: tuple[ProposalHead, list[Proposal]],
    new: tuple[ProposalHead, list[Proposal]],
    data: st.DataObject,
) -> None:
    memory, mailbox = fresh()
    mailbox.write_proposals(*old)
    before = bytes(memory)
    mailbox.write_proposals(*new)
    after = bytes(memory)
    changed = [i for i in range(len(before)) if before[i] != after[i]]
    if not changed:
        return
    # Some of what was written has arrived, in any order.
    arrived = data.draw(st.sets(st.sampled_from(changed)))
    memory[:] = bytes(after[i] if i in arrived else before[i] for i in range(len(before)))
    try:
        found = mailbox.read_proposals()
    except ProtocolError:
        return
    assert found in (None, old, new)


class Moving(mmap.mmap):
    """Memory that somebody writes to right before the reader's n-th look at it."""

    looks = 0
    write: Any = None

    def __getitem__(self, key: Any) -> Any:
        if self.looks == 0 and self.write is not None:
            write, self.write = self.write, None
            write()
        self.looks -= 1
        return super().__getitem__(key)


@pytest.mark.parametrize("look", range(12))
def test_mailbox_written_while_it_is_read_gives_no_mixture(look: int) -> None:
    def turn(step: int) -> tuple[ProposalHead, list[Proposal]]:
        row = SparseRow((step, 2), (0.25, 0.75))
        return (
            ProposalHead(7, step),
            [Proposal(one, 1, 40 + step, (step, 6), (row, row)) for one in (11, 12)],
        )

    def verdicts(step: int) -> tuple[VerdictHead, list[Judgement]]:
        return VerdictHead(7, step), [Judgement(11, 1, 1, step, 43 + step, 4)]

    memory = Moving(-1, SMALL.size)
    mailbox = Mailbox(memory, SMALL)
    mailbox.write_proposals(*turn(1))
    mailbox.write_verdicts(*verdicts(1))
    memory.looks, memory.write = look, lambda: mailbox.write_proposals(*turn(2))
    assert mailbox.read_proposals() in (None, turn(1), turn(2))
    memory.looks, memory.write = look, lambda: mailbox.write_verdicts(*verdicts(2))
    assert mailbox.read_verdicts() in (None, verdicts(1), verdicts(2))


@pytest.mark.parametrize(
    ("offset", "value", "says"),
    [
        (SMALL.proposals + 12, SMALL.max_sequences + 1, "proposals in the mailbox"),
        (SMALL.proposals + 40 + 16, SMALL.max_k + 1, "tokens of a proposal"),
        (SMALL.proposals + 40 + 20, SMALL.max_k + 1, "rows of a proposal"),
        (SMALL.rows, SMALL.row_entries + 1, "entries of a row"),
        (SMALL.verdicts + 12, SMALL.max_sequences + 1, "verdicts in the mailbox"),
        (SMALL.verdicts + 12, (1 << 32) - 1, "verdicts in the mailbox"),
    ],
)
def test_mailbox_counts_beyond_its_sizes_are_told(offset: int, value: int, says: str) -> None:
    memory, mailbox = fresh()
    mailbox.write_proposals(*TURN)
    mailbox.write_verdicts(*VERDICTS)
    struct.pack_into("<I", memory, offset, value)
    with pytest.raises(ProtocolError, match=says) as error:
        mailbox.read_verdicts() if "verdicts" in says else mailbox.read_proposals()
    assert f"got {value}; must be at most" in str(error.value)


def formatted(layout: Layout = SMALL) -> Any:
    memory, mailbox = fresh(layout)
    mailbox.format(0x1122334455667788)
    return memory


def test_mailbox_header_is_laid_out_as_documented() -> None:
    # These bytes are the contract between two builds: who changes them raises LAYOUT.
    assert LAYOUT == 2
    memory = formatted(Layout(2, 3, 4))
    assert bytes(memory[:48]).hex() == (
        "4f55545249444552"  # "OUTRIDER"
        "02000000"  # layout version
        "30000000"  # bytes of the header
        "0010000000000000"  # bytes of the region
        "020000000300000004000000"  # sequences, K, entries of a row
        "00000000"
        "8877665544332211"  # canary
    )
    assert not any(memory[48:])


def test_mailbox_offsets_are_as_documented() -> None:
    layout = Layout(2, 3, 4)
    memory, mailbox = fresh(layout)
    mailbox.format(5)
    mailbox.prove()
    assert (mailbox_module._PROOF, BEATS, BELLS, PREPARED) == (
        128, (192, 256), (320, 384), (448, 456),
    )  # fmt: skip
    assert struct.unpack_from("<Q", memory, 128) == (5 ^ 0x9E3779B97F4A7C15,)
    assert (layout.proposals, layout.entry, layout.verdicts) == (520, 40, 648)
    assert (layout.rows, layout.row, layout.size) == (768, 40, 4096)
    row = SparseRow((8, 9), (0.25, 0.75))
    mailbox.write_proposals(
        ProposalHead(1, 2, ENDS, 4, 0.5, 1.5), [Proposal(5, 6, 7, (10, 11), (row,))]
    )
    mailbox.write_verdicts(VerdictHead(1, 2), [Judgement(5, 6, 1, 12, 9, 3)])
    golden = {
        520: struct.pack("<QIIIIdd", 1, 2, 1, ENDS, 4, 0.5, 1.5),
        560: struct.pack("<QIIIIII", 5, 6, 7, 2, 1, 10, 11),
        648: struct.pack("<QIII", 1, 2, 1, 0),
        668: struct.pack("<QIIIII", 5, 6, 1, 12, 9, 3),
        768: struct.pack("<IIIff", 2, 8, 9, 0.25, 0.75),
    }
    for offset, wanted in golden.items():
        assert bytes(memory[offset : offset + len(wanted)]) == wanted, offset
    # Checksums: CRC-32 over entries and their rows, then the head, in the four bytes before it.
    proposals = zlib.crc32(golden[520], zlib.crc32(golden[768], zlib.crc32(golden[560])))
    assert struct.unpack_from("<I", memory, 516) == (proposals,)
    verdicts = zlib.crc32(golden[648], zlib.crc32(golden[668]))
    assert struct.unpack_from("<I", memory, 644) == (verdicts,)


def test_mailbox_header_tells_its_layout() -> None:
    for layout in (SMALL, Layout(1, 1, 1), Layout(7, 64, 3)):
        assert layout_of(formatted(layout)) == layout


@pytest.mark.parametrize(
    ("offset", "kind", "value", "says"),
    [
        (0, "<B", 0x6F, "not a mailbox: it begins with b'oUTRIDER', not b'OUTRIDER'"),
        (8, "<I", LAYOUT + 1, f"mailbox layout {LAYOUT + 1}; this side has {LAYOUT}"),
        (12, "<I", 56, "mailbox layout"),
        (16, "<Q", 8192, "has 4096 bytes; this one says 8192 and has 4096"),
        (24, "<I", 0, "mailbox max_sequences: got 0; must be in 1..1024"),
        (24, "<I", 1025, "mailbox max_sequences: got 1025; must be in 1..1024"),
        (28, "<I", 65, "mailbox max_k: got 65; must be in 1..64"),
        (32, "<I", 4097, "mailbox row_entries: got 4097; must be in 1..4096"),
        (32, "<I", 4096, "a mailbox for 4 sequences of 5 tokens has"),
    ],
)
def test_mailbox_header_that_is_wrong_is_told(
    offset: int, kind: str, value: int, says: str
) -> None:
    memory = formatted()
    struct.pack_into(kind, memory, offset, value)
    with pytest.raises(ProtocolError) as error:
        layout_of(memory)
    assert says in str(error.value)


def test_mailbox_that_was_cut_short_is_told() -> None:
    memory = formatted(Layout(40, 8, 8))
    with pytest.raises(ProtocolError, match="header alone has 512"):
        layout_of(memoryview(memory)[:511])
    with pytest.raises(ProtocolError, match="and has 4096"):
        layout_of(memoryview(memory)[:4096])
    with pytest.raises(ProtocolError, match="not a mailbox"):
        layout_of(bytearray(4096))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 1024), st.integers(1, 64), st.integers(1, 4096))
def test_mailbox_regions_do_not_overlap(sequences: int, k: int, entries: int) -> None:
    layout = Layout(sequences, k, entries)
    regions = [
        (0, 48),
        (mailbox_module._PROOF, 8),
        *((offset, 8) for offset in (*BEATS, *BELLS)),
        (layout.proposals - 8, 8 + 40 + sequences * layout.entry),
        (layout.verdicts - 8, 8 + 20 + sequences * 28),
        (layout.rows, sequences * k * layout.row),
    ]
    ends = [(start, start + size) for start, size in regions]
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    assert ends[-1][1] <= layout.size and layout.size % mmap.PAGESIZE == 0
    assert layout.entry >= 24 + 4 * k and layout.row >= 4 + 8 * entries
    # Counters that different sides write are on cache lines of their own.
    words = (mailbox_module._PROOF, *BEATS, *BELLS, layout.proposals - 8)
    assert len({offset // 64 for offset in words}) == len(words)
    assert layout.verdicts // 64 > (layout.proposals + 40) // 64
