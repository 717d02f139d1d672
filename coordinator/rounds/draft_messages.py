"""What a message to the draft asks for, and what its answer offers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from outrider.coordinator.requests.sequence import Sequence as Seq
from outrider.coordinator.telemetry.records import NOT_ASKED, ServiceTiming
from outrider.protos import speculation_pb2 as pb
from outrider.shared.core.wire import write_open


@dataclass(frozen=True, slots=True)
class DraftOffer:
    """One sequence's proposal; it may have no tokens."""

    tokens: list[int]
    rows: Sequence[pb.SparseRow]
    """For `rejection`: the distribution each token was drawn from; else empty."""


@dataclass(slots=True)
class Proposals:
    """What the draft offered in one round, by sequence id."""

    by_id: dict[int, DraftOffer] = field(default_factory=dict)
    timing: ServiceTiming = NOT_ASKED
    clean: bool = True
    """Whether the round's times say what speculation costs: the draft took in no prompt."""


@dataclass(frozen=True, slots=True)
class DraftAsked:
    """One sequence of a draft message."""

    sequence: Seq
    n: int
    """Length of the log when asked."""
    k: int

    def offer(self, proposal: pb.Proposal) -> DraftOffer | None:
        """What it was answered; None where that is not an answer to what was asked.

        Fewer than ``k`` tokens are one, and so are none. What they are worth is the verifier's to
        find out, whatever way they come.
        """
        tokens = list(proposal.tokens)
        sound = (
            proposal.epoch == self.sequence.draft.epoch
            and proposal.committed_len == self.n
            and len(tokens) <= self.k
            and len(proposal.rows) == (len(tokens) if self.sequence.needs_rows else 0)
        )
        return DraftOffer(tokens, proposal.rows) if sound else None


@dataclass(frozen=True, slots=True)
class DraftGrant:
    """A grant that the draft has been given."""

    answer: asyncio.Future[pb.DraftResponse]
    asked: dict[int, DraftAsked]


def append_wanted(
    request: pb.DraftRequest, wanted: Iterable[tuple[Seq, int]]
) -> tuple[dict[int, DraftAsked], int]:
    """Asks for ``k`` tokens of each; returns all by sequence id, and the most rows of one."""
    asked: dict[int, DraftAsked] = {}
    most = 0
    for sequence, k in wanted:
        n = len(sequence.log)
        most = max(most, append_item(request, sequence, n, k))
        asked[sequence.sequence_id] = DraftAsked(sequence, n, k)
    return asked, most


def append_item(request: pb.DraftRequest, sequence: Seq, upto: int, k: int) -> int:
    """Adds the item that brings the draft to ``log[:upto]``; returns its rows."""
    state = sequence.draft
    if not state.open:
        request.open.append(write_open(sequence.opening(state)))
    base = min(state.length, upto - 1)
    request.items.add(
        sequence_id=sequence.sequence_id,
        epoch=state.epoch,
        base_len=base,
        append=sequence.log[base:upto],
        k=k,
    )
    state.length = upto
    return upto - base
