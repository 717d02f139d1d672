"""What the verifier makes of a draft that does not answer."""

from __future__ import annotations

import mmap
from typing import Any

import pytest

from outrider.protos import speculation_pb2 as pb
from outrider.shared.link.doorbell import PeerGone, PeerLate
from outrider.shared.link.mailbox import ENDS, Layout, Mailbox, VerdictHead
from outrider.shared.rounds import grant_loop
from outrider.shared.rounds.grants import Control
from outrider.verify_service.service import SIDE

LAYOUT = Layout(1, 4, 1)


class Silent:
    """A doorbell that nobody rings; ``gone``: and nobody hears."""

    def __init__(self, gone: bool) -> None:
        self.mailbox = Mailbox(mmap.mmap(-1, LAYOUT.size), LAYOUT)
        self.gone = gone
        self.closed = False

    def await_turn(self, *_: Any) -> Any:
        raise PeerLate("the draft did not answer in 1 s")

    def ring(self) -> None:
        if self.gone:
            raise PeerGone("the draft has let go of the mailbox")

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("gone", [False, True])
def test_late_draft_is_told_and_the_mailbox_stays(gone: bool) -> None:
    grant = pb.Grant(id=3, mailbox=9, rounds=8, patience_seconds=1.0, link="shm")
    grant.sequences.add(k=2, limit=20)
    message = pb.VerifyRequest(round=5, grant=grant)
    message.items.add(sequence_id=1, epoch=1, base_len=4, append=[7])
    bell: Any = Silent(gone)
    session: Any = None
    (answer,) = grant_loop.run(SIDE, session, message, bell, Control(grant), lambda *_: None)
    assert (answer.round, answer.grant_end.id, answer.grant_end.rounds) == (5, 3, 0)
    assert answer.grant_end.reason == pb.GRANT_END_REASON_LATE
    assert bell.mailbox.read_verdicts() == (VerdictHead(3, 0, ENDS), [])
    assert not bell.closed
