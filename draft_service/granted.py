"""Where the sequences of a grant stand with the draft; knows nothing of how proposals travel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outrider.shared.core.errors import ProtocolError
from outrider.shared.core.types import Proposal, ProposeItem, RoundResult
from outrider.shared.link.mailbox import Judgement

if TYPE_CHECKING:
    from outrider.shared.rounds.session import Session


@dataclass(slots=True)
class DraftLane:
    """Where one sequence stands with the draft."""

    sequence_id: int
    epoch: int
    base_len: int
    """Tokens whose KV is kept."""
    append: tuple[int, ...]
    """What the log has after them, ending in the pending token."""
    k: int
    proposal: tuple[int, ...] = ()

    @property
    def log_len(self) -> int:
        """Tokens of the log, the proposal not among them."""
        return self.base_len + len(self.append)

    def item(self) -> ProposeItem:
        """What the engine is asked for."""
        return ProposeItem(self.sequence_id, self.epoch, self.base_len, self.append, self.k)

    def proposed(self, proposal: Proposal) -> None:
        """All of ``append`` is taken in, and of the proposal all but its last token."""
        self.base_len += len(self.append)
        self.append = ()
        self.proposal = proposal.tokens

    def judged(self, one: Judgement) -> None:
        """What of the proposal is in the log, the base's own token, and what is lacking."""
        new = (*self.proposal[: one.num_accepted], one.next_token)
        # Of `new` the draft has the KV of the accepted ones, save that of its very last token.
        kept = min(one.num_accepted, max(len(self.proposal) - 1, 0))
        self.base_len += kept
        self.append += new[kept:]
        self.proposal = ()
        self.k = one.next_k


class DraftRounds:
    """The draft's part of the rounds of a grant."""

    def __init__(
        self, session: Session[ProposeItem, Proposal], items: Sequence[ProposeItem]
    ) -> None:
        """``session``: the stream's sequences; ``items``: where they stand."""
        self._session = session
        self.lanes = [
            DraftLane(one.sequence_id, one.epoch, one.base_len, one.append, one.k) for one in items
        ]
        """The sequences, in the grant's order."""
        self._by_id = {lane.sequence_id: lane for lane in self.lanes}
        self.items: list[ProposeItem] = []
        """What the last round asked of the engine."""

    def propose(self) -> RoundResult[Proposal]:
        """One proposal for each sequence that is to have one."""
        return self._served(self._session.round)

    def settle(self, found: Sequence[Sequence[int]]) -> RoundResult[Proposal]:
        """``propose`` where the device has: the tokens of each that is to have some."""
        return self._served(lambda items: self._session.settle(items, found))

    def judged(self, verdicts: Sequence[Judgement]) -> None:
        """Takes in the verdicts; raises ``ProtocolError`` for one that can't be."""
        for one in verdicts:
            lane = self._by_id.get(one.sequence_id)
            # Its epoch is the verifier's own, and may be another than the draft's.
            if (
                lane is None
                or one.num_accepted > len(lane.proposal)
                or one.committed_len != lane.log_len + one.num_accepted + 1
            ):
                raise ProtocolError(f"a verdict on what was not proposed: {one}")
            lane.judged(one)

    def _served(
        self, serve: Callable[[Sequence[ProposeItem]], RoundResult[Proposal]]
    ) -> RoundResult[Proposal]:
        self.items = [lane.item() for lane in self.lanes if lane.k > 0]
        result = serve(self.items)
        for answer in result.answers:
            self._by_id[answer.sequence_id].proposed(answer)
        return result
