"""The mailbox's half in device memory: what the devices read and write between turns.

Each side has a region of its own that the other maps. It reads and waits in its own region and
writes in the other's, so that waiting never depends on memory of a process that may be gone, and
costs no traffic where the two have a device each. Little-endian, at fixed offsets::

    0      canary     64 random bits, written by the owner
    8      proof      the other side's answer to the canary
    128    bell       rises with each thing that was put here
    512    verdicts   int32 [sequences, 4]: accepted, next token, committed length, goes on (0, 1)
           proposals  int32 [sequences, K]

The verifier's region holds proposals, the draft's verdicts; both have one layout. A bell holds
``grant << 32 | turns``: it rises over all grants and is never set back. ``turns`` of ``ENDED``
lets whoever waits pass and do nothing. Whatever the hosts must know goes through
``shared/link/mailbox.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ENDED = 0xFFFFFFFF
"""Turns in a bell that say that the grant is over."""
MOST_GRANTS = 1 << 31
_CANARY, _PROOF, _BELL, _SLOTS = 0, 8, 128, 512
_VERDICT_FIELDS = 4
_MASK = 0x9E3779B97F4A7C15


def bell(grant: int, turns: int) -> int:
    """What a bell holds after ``turns`` turns of the grant with number ``grant``."""
    if not 0 <= grant < MOST_GRANTS:
        raise ValueError(f"grant: got {grant}; must be in 0..{MOST_GRANTS - 1}")
    return grant << 32 | turns


@dataclass(frozen=True, slots=True)
class DeviceLayout:
    """Sizes of a region."""

    max_sequences: int
    max_k: int

    @property
    def proposals(self) -> int:
        """Offset of the proposals."""
        return _SLOTS + -(-4 * _VERDICT_FIELDS * self.max_sequences // 64) * 64

    @property
    def size(self) -> int:
        """Bytes of a region."""
        return -(-(self.proposals + 4 * self.max_sequences * self.max_k) // 4096) * 4096


class DeviceRegion:
    """One side's region as tensors, seen by either side."""

    def __init__(self, memory: Tensor, layout: DeviceLayout) -> None:
        """``memory``: uint8 [layout.size]."""
        if memory.dtype != torch.uint8 or memory.shape != (layout.size,):
            raise ValueError(f"memory: got {memory.dtype} {tuple(memory.shape)}")
        self._memory, self.layout = memory, layout
        self.bell = self._long(_BELL)
        """int64 [1]."""
        self.verdicts = self._ints(_SLOTS, layout.max_sequences, _VERDICT_FIELDS)
        """int32 [sequences, 4]."""
        self.proposals = self._ints(layout.proposals, layout.max_sequences, layout.max_k)
        """int32 [sequences, K]."""

    def format(self, canary: int) -> None:
        """The owner's: clears the region and writes the canary (64 bits)."""
        self._memory.zero_()
        self._long(_CANARY).fill_(_signed(canary))

    def prove(self) -> None:
        """The other's: answers the canary, which only who has mapped this very memory can."""
        canary = int(self._long(_CANARY).item()) % (1 << 64)
        self._long(_PROOF).fill_(_signed(canary ^ _MASK))

    def proven(self, canary: int) -> bool:
        """The owner's: whether the answer to ``canary`` is there."""
        return int(self._long(_PROOF).item()) == _signed(canary ^ _MASK)

    def _ints(self, at: int, rows: int, columns: int) -> Tensor:
        return self._memory[at : at + 4 * rows * columns].view(torch.int32).view(rows, columns)

    def _long(self, at: int) -> Tensor:
        return self._memory[at : at + 8].view(torch.int64)


class DeviceMailbox:
    """Both regions as one side sees them."""

    def __init__(
        self, own: DeviceRegion, other: DeviceRegion, side: Literal["verify", "draft"]
    ) -> None:
        self.layout = own.layout
        inbox, outbox = own, other
        self.heard = inbox.bell
        """int64 [1]: the bell that this side waits for."""
        self.rung = outbox.bell
        """int64 [1]: the bell that it rings."""
        verifies = side == "verify"
        self.proposals = inbox.proposals if verifies else outbox.proposals
        """int32 [sequences, K]."""
        self.verdicts = outbox.verdicts if verifies else inbox.verdicts
        """int32 [sequences, 4]."""


def _signed(bits: int) -> int:
    """The int64 with these 64 bits."""
    return bits - (1 << 64) if bits >> 63 else bits
