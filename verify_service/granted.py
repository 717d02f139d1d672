"""Where the sequences of a grant stand with the verifier; knows nothing of how proposals travel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outrider.protos import speculation_pb2 as pb
from outrider.shared.core.errors import ProtocolError
from outrider.shared.core.types import Proposal, RoundResult, Verdict, VerifyItem
from outrider.shared.link.mailbox import Judgement
from outrider.shared.rounds.grants import next_k

if TYPE_CHECKING:
    from outrider.shared.rounds.session import Session


@dataclass(slots=True)
class VerifyLane:
    """Where one sequence stands with the verifier."""

    sequence_id: int
    epoch: int
    base_len: int
    append: tuple[int, ...]
    k: int
    limit: int
    """Log length at which the grant ends."""
    stops: frozenset[int]

    @property
    def committed_len(self) -> int:
        """Tokens of the log that are final."""
        return self.base_len + len(self.append)

    def ends(self, accepted: int, token: int, proposal: Sequence[int]) -> bool:
        """Whether the sequence comes to its end with so many of a proposal, and ``token``."""
        return (
            self.committed_len + accepted + 1 >= self.limit
            or token in self.stops
            or not self.stops.isdisjoint(proposal[:accepted])
        )

    def judged(self, verdict: Verdict, proposal: Sequence[int]) -> bool:
        """Goes on from the verdict; whether the sequence has come to its end."""
        assert verdict.next_token is not None
        over = self.ends(verdict.num_accepted, verdict.next_token, proposal)
        self.base_len, self.append = verdict.committed_len - 1, (verdict.next_token,)
        return over


class VerifyRounds:
    """The verifier's part of the rounds of a grant."""

    def __init__(
        self,
        session: Session[VerifyItem, Verdict],
        items: Sequence[VerifyItem],
        granted: Sequence[pb.GrantedSequence],
    ) -> None:
        """``session``: the stream's sequences; ``items``: where they stand."""
        if len(items) != len(granted):
            raise ProtocolError(f"a grant of {len(granted)} sequences with {len(items)} items")
        self._session = session
        self.lanes = [
            VerifyLane(
                item.sequence_id, item.epoch, item.base_len, item.append, one.k, one.limit,
                frozenset(one.stop_token_ids),
            )
            for item, one in zip(items, granted, strict=True)
        ]  # fmt: skip
        self.items: list[VerifyItem] = []
        """What the last round asked of the engine."""
        self.stopped = False
        """Whether a sequence has come to its end."""

    def judge(self, proposals: Sequence[Proposal]) -> RoundResult[Verdict]:
        """Judges one proposal for each sequence; those without one decode a token."""
        return self._served(proposals, self._session.round)

    def settle(
        self, proposals: Sequence[Proposal], found: Sequence[tuple[int, int]]
    ) -> RoundResult[Verdict]:
        """``judge`` where the device has judged: accepted and next token of each sequence."""
        return self._served(proposals, lambda items: self._session.settle(items, found))

    def change(self, ks: Sequence[int]) -> None:
        """New Ks from the next round on, in the grant's order; others are ignored."""
        if len(ks) == len(self.lanes):
            for lane, k in zip(self.lanes, ks, strict=True):
                lane.k = k if lane.k else 0

    def judgements(self, verdicts: Sequence[Verdict]) -> list[Judgement]:
        """The verdicts as the draft needs them, of the sequences that it drafts for."""
        return [
            Judgement(
                one.sequence_id, one.epoch, one.num_accepted, one.next_token or 0,
                one.committed_len, next_k(lane.k, lane.limit, one.committed_len),
            )
            for lane, one in zip(self.lanes, verdicts, strict=True)
            if lane.k
        ]  # fmt: skip

    def _served(
        self,
        proposals: Sequence[Proposal],
        serve: Callable[[Sequence[VerifyItem]], RoundResult[Verdict]],
    ) -> RoundResult[Verdict]:
        offered = {one.sequence_id: one for one in proposals}
        self.items = []
        for lane in self.lanes:
            found = offered.pop(lane.sequence_id, None)
            if found is None:
                item = VerifyItem(lane.sequence_id, lane.epoch, lane.base_len, lane.append)
            else:
                # Its epoch is the draft's own: each service counts how often it was opened there.
                if found.committed_len != lane.committed_len:
                    raise ProtocolError(
                        f"a proposal at {found.committed_len}; sequence {lane.sequence_id} "
                        f"stands at {lane.committed_len}"
                    )
                item = VerifyItem(
                    lane.sequence_id, lane.epoch, lane.base_len, lane.append, found.tokens,
                    found.rows,
                )  # fmt: skip
            self.items.append(item)
        if offered:
            raise ProtocolError(f"proposals for sequences {sorted(offered)}, which are not granted")
        result = serve(self.items)
        if not result.refusals:
            for lane, item, verdict in zip(self.lanes, self.items, result.answers, strict=True):
                self.stopped |= lane.judged(verdict, item.proposal)
        return result
