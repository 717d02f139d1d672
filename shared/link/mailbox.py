"""The mailbox: one region of memory in which draft and verifier hand each other their rounds.

Everything is little-endian and at a fixed offset::

    0      header      magic, layout version, sizes, canary; written once by the verifier
    128    proof       the draft's answer to the canary
    192    beat        of the verifier: rises ten times a second while its process runs
    256    beat        of the draft
    320    bell        of the verifier: rises with each verdict slot that it filled
    384    bell        of the draft: likewise for proposals
    448    prepared    of the verifier: 1 when it has done what it does before a first grant
    456    prepared    of the draft
    512    proposals   checksum, head, then one entry for each sequence
           verdicts    checksum, head, then one entry for each sequence
           rows        draft probabilities of each proposed token, for the rule `rejection`

Draft and verifier take turns, so one slot in each direction is enough. A ring of the other
side's ``doorbell`` says that its slot is filled; one that was left over from an earlier grant
may have the slot read too early, which its checksum tells.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from outrider.shared.core.errors import ProtocolError
from outrider.shared.core.types import Proposal, SparseRow

LAYOUT = 2
"""Version of the layout; both sides must have the same."""
MAGIC = b"OUTRIDER"
MOST_SEQUENCES, MOST_K, MOST_ROW_ENTRIES = 1024, 64, 4096
ENDS = 1
"""Flag of a head: the writer's last word in this grant."""

_HEADER = struct.Struct("<8sIIQIIIIQ")
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_PROOF, BEATS, BELLS, PREPARED, _SLOTS = 128, (192, 256), (320, 384), (448, 456), 512
_SEAL = 8
"""Bytes before each slot's head, the last four of which are its checksum."""
_PROPOSALS = struct.Struct("<QIIIIdd")
_PROPOSAL = struct.Struct("<QIIII")
_VERDICTS = struct.Struct("<QIII")
_VERDICT = struct.Struct("<QIIIII")
_MASK = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things are, for these sizes; raises ``ProtocolError`` for sizes out of range."""

    max_sequences: int
    max_k: int
    row_entries: int

    def __post_init__(self) -> None:
        for name, value, most in (
            ("max_sequences", self.max_sequences, MOST_SEQUENCES),
            ("max_k", self.max_k, MOST_K),
            ("row_entries", self.row_entries, MOST_ROW_ENTRIES),
        ):
            if not 1 <= value <= most:
                raise ProtocolError(f"mailbox {name}: got {value}; must be in 1..{most}")

    @property
    def proposals(self) -> int:
        """Offset of the proposals."""
        return _SLOTS + _SEAL

    @property
    def entry(self) -> int:
        """Bytes of one proposal."""
        return _aligned(_PROPOSAL.size + 4 * self.max_k)

    @property
    def verdicts(self) -> int:
        """Offset of the verdicts."""
        end = self.proposals + _PROPOSALS.size + self.max_sequences * self.entry
        return _aligned(end, 64) + _SEAL

    @property
    def row(self) -> int:
        """Bytes of one row of probabilities."""
        return _aligned(4 + 8 * self.row_entries)

    @property
    def rows(self) -> int:
        """Offset of the rows."""
        return _aligned(self.verdicts + _VERDICTS.size + self.max_sequences * _VERDICT.size, 64)

    @property
    def size(self) -> int:
        """Bytes of the region."""
        return _aligned(self.rows + self.max_sequences * self.max_k * self.row, 4096)


@dataclass(frozen=True, slots=True)
class ProposalHead:
    """What the draft says of its turn."""

    grant: int
    step: int
    flags: int = 0
    rows: int = 0
    model_seconds: float = 0.0
    service_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Judgement:
    """One sequence's verdict, as the draft needs it to go on."""

    sequence_id: int
    epoch: int
    num_accepted: int
    next_token: int
    committed_len: int
    next_k: int
    """Draft tokens wanted next; 0: none this time."""


@dataclass(frozen=True, slots=True)
class VerdictHead:
    """What the verifier says of its turn."""

    grant: int
    step: int
    flags: int = 0


class Mailbox:
    """Reads and writes the region; knows neither processes nor models."""

    def __init__(self, memory: Any, layout: Layout) -> None:
        """``memory``: a writable buffer of ``layout.size`` bytes."""
        self._memory = memory
        self.layout = layout

    # --- mapping ---------------------------------------------------------------------------------

    def format(self, canary: int) -> None:
        """Writes the header; ``canary`` is 64 random bits."""
        layout = self.layout
        _HEADER.pack_into(
            self._memory, 0, MAGIC, LAYOUT, _HEADER.size, layout.size, layout.max_sequences,
            layout.max_k, layout.row_entries, 0, canary,
        )  # fmt: skip

    def prove(self) -> None:
        """Writes the answer to the canary: whoever can do that has mapped this very region."""
        canary = _HEADER.unpack_from(self._memory, 0)[-1]
        _U64.pack_into(self._memory, _PROOF, canary ^ _MASK)

    def proven(self, canary: int) -> bool:
        """Whether the answer to ``canary`` is there."""
        return bool(_U64.unpack_from(self._memory, _PROOF)[0] == canary ^ _MASK)

    def word(self, offset: int) -> int:
        """A counter: one of ``BEATS`` or ``BELLS``."""
        return int(_U64.unpack_from(self._memory, offset)[0])

    def set_word(self, offset: int, value: int) -> None:
        """Sets a counter of one's own."""
        _U64.pack_into(self._memory, offset, value)

    # --- proposals -------------------------------------------------------------------------------

    def write_proposals(self, head: ProposalHead, proposals: Sequence[Proposal]) -> None:
        """Fills the draft's slot."""
        layout = self.layout
        at = layout.proposals + _PROPOSALS.size
        check = 0
        for index, one in enumerate(proposals):
            count = len(one.tokens)
            data = _PROPOSAL.pack(
                one.sequence_id, one.epoch, one.committed_len, count, len(one.rows)
            )
            check = self._write(at, data + struct.pack(f"<{count}I", *one.tokens), check)
            at += layout.entry
            row_at = layout.rows + index * layout.max_k * layout.row
            for row in one.rows:
                entries = len(row.ids)
                data = struct.pack(f"<I{entries}I{entries}f", entries, *row.ids, *row.probabilities)
                check = self._write(row_at, data, check)
                row_at += layout.row
        data = _PROPOSALS.pack(
            head.grant, head.step, len(proposals), head.flags, head.rows, head.model_seconds,
            head.service_seconds,
        )  # fmt: skip
        self._seal(layout.proposals, data, check)

    def read_proposals(self) -> tuple[ProposalHead, list[Proposal]] | None:
        """What is in the draft's slot; None while it is being written.

        Raises ``ProtocolError`` for what can't be.
        """
        layout, memory = self.layout, self._memory
        at = layout.proposals
        # Each part is copied once: what the checksum is of is what is looked at.
        top = bytes(memory[at : at + _PROPOSALS.size])
        grant, step, count, flags, rows, model, service = _PROPOSALS.unpack(top)
        _within("proposals in the mailbox", count, layout.max_sequences)
        at += _PROPOSALS.size
        check = 0
        found = []
        for index in range(count):
            data = bytes(memory[at : at + layout.entry])
            sequence_id, epoch, committed_len, length, weights = _PROPOSAL.unpack_from(data)
            _within("tokens of a proposal", length, layout.max_k)
            _within("rows of a proposal", weights, layout.max_k)
            body = struct.unpack_from(f"<{length}I", data, _PROPOSAL.size)
            check = zlib.crc32(data[: _PROPOSAL.size + 4 * length], check)
            at += layout.entry
            row_at = layout.rows + index * layout.max_k * layout.row
            distributions = []
            for _ in range(weights):
                (entries,) = _U32.unpack_from(memory, row_at)
                _within("entries of a row", entries, layout.row_entries)
                data = bytes(memory[row_at : row_at + 4 + 8 * entries])
                values = struct.unpack_from(f"<{entries}I{entries}f", data, 4)
                check = zlib.crc32(data, check)
                distributions.append(SparseRow(values[:entries], values[entries:]))
                row_at += layout.row
            found.append(Proposal(sequence_id, epoch, committed_len, body, tuple(distributions)))
        if not self._sealed(layout.proposals, zlib.crc32(top, check)):
            return None
        return ProposalHead(grant, step, flags, rows, model, service), found

    # --- verdicts --------------------------------------------------------------------------------

    def write_verdicts(self, head: VerdictHead, verdicts: Sequence[Judgement]) -> None:
        """Fills the verifier's slot."""
        at = self.layout.verdicts
        data = b"".join(
            _VERDICT.pack(
                one.sequence_id, one.epoch, one.num_accepted, one.next_token, one.committed_len,
                one.next_k,
            )
            for one in verdicts
        )  # fmt: skip
        check = self._write(at + _VERDICTS.size, data, 0)
        self._seal(at, _VERDICTS.pack(head.grant, head.step, len(verdicts), head.flags), check)

    def read_verdicts(self) -> tuple[VerdictHead, list[Judgement]] | None:
        """What is in the verifier's slot; None while it is being written.

        Raises ``ProtocolError`` for what can't be.
        """
        memory, at = self._memory, self.layout.verdicts
        top = bytes(memory[at : at + _VERDICTS.size])
        grant, step, count, flags = _VERDICTS.unpack(top)
        _within("verdicts in the mailbox", count, self.layout.max_sequences)
        first = at + _VERDICTS.size
        data = bytes(memory[first : first + count * _VERDICT.size])
        found = [Judgement(*values) for values in _VERDICT.iter_unpack(data)]
        if not self._sealed(at, zlib.crc32(top, zlib.crc32(data))):
            return None
        return VerdictHead(grant, step, flags), found

    # --- parts -----------------------------------------------------------------------------------

    def _write(self, at: int, data: bytes, check: int) -> int:
        self._memory[at : at + len(data)] = data
        return zlib.crc32(data, check)

    def _seal(self, at: int, head: bytes, check: int) -> None:
        """Writes the head, and before it the checksum of head and body."""
        self._memory[at : at + len(head)] = head
        _U32.pack_into(self._memory, at - _U32.size, zlib.crc32(head, check))

    def _sealed(self, at: int, check: int) -> bool:
        """Whether ``check`` is the checksum of the slot whose head is at ``at``."""
        (seal,) = _U32.unpack_from(self._memory, at - _U32.size)
        return bool(seal == check)


def _within(what: str, value: int, most: int) -> None:
    if value > most:
        raise ProtocolError(f"{what}: got {value}; must be at most {most}")


def layout_of(memory: Any) -> Layout:
    """The layout that a header tells; raises ``ProtocolError`` where it is not one of ours."""
    if len(memory) < _SLOTS:
        raise ProtocolError(f"a mailbox of {len(memory)} bytes; its header alone has {_SLOTS}")
    magic, version, header, size, sequences, k, entries, _, _ = _HEADER.unpack_from(memory, 0)
    if magic != MAGIC:
        raise ProtocolError(f"not a mailbox: it begins with {bytes(magic)!r}, not {MAGIC!r}")
    if version != LAYOUT or header != _HEADER.size:
        raise ProtocolError(f"mailbox layout {version}; this side has {LAYOUT}")
    layout = Layout(sequences, k, entries)
    if size != layout.size or size != len(memory):
        raise ProtocolError(
            f"a mailbox for {sequences} sequences of {k} tokens has {layout.size} bytes; this one "
            f"says {size} and has {len(memory)}"
        )
    return layout


def _aligned(size: int, to: int = 8) -> int:
    return -(-size // to) * to
