"""Reports of rounds that the services ran by themselves, and sequences that ended meanwhile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from outrider.coordinator.requests.prefix_cache import PrefixCache
from outrider.coordinator.requests.service_state import ServiceState
from outrider.coordinator.requests.text.stopping import Finish, FinishReason
from outrider.coordinator.rounds.verifying import Verifying
from outrider.protos import speculation_pb2 as pb


def sequence() -> Any:
    return SimpleNamespace(
        sequence_id=4,
        log=[7] * 10,
        verify=ServiceState(open=True, epoch=1, length=9),
        output=SimpleNamespace(finish=None),
        confirm=lambda state: None,
    )


def report(committed_len: int, proposed: int, accepted: int) -> pb.VerifyResponse:
    """One round, which began with ``committed_len`` tokens in the log."""
    verdict = pb.Verdict(
        sequence_id=4, epoch=1, num_accepted=accepted, next_token=3,
        committed_len=committed_len + accepted + 1,
    )  # fmt: skip
    made = pb.VerifyResponse(round=1, verdicts=[verdict])
    made.granted.proposals.add(
        sequence_id=4, epoch=1, committed_len=committed_len, tokens=[3] * proposed
    )
    return made


def test_verifying_takes_reports_one_after_the_other() -> None:
    own = sequence()
    verifying = Verifying(None, PrefixCache())  # type: ignore[arg-type]
    for proposed, accepted in ((4, 2), (4, 0), (0, 0)):
        n = len(own.log)
        verdicts = verifying.granted_round({4: own}, report(n, proposed, accepted))
        assert len(verdicts.given) == 1 and not verdicts.failed
        own.log += [3] * (accepted + 1)
        assert own.verify.length == n + accepted
    # A report that does not follow is told, and is that sequence's end.
    verdicts = verifying.granted_round({4: own}, report(len(own.log) + 1, 4, 0))
    assert not verdicts.given and len(verdicts.failed) == 1


def test_verifying_passes_over_rounds_of_a_sequence_that_is_over_by_the_clients_will() -> None:
    own = sequence()
    verifying = Verifying(None, PrefixCache())  # type: ignore[arg-type]
    own.output.finish = Finish(FinishReason.DEADLINE)
    # The grant goes on for a round or two: the log does not, so the later ones can't follow it.
    for committed_len in (10, 12, 13):
        verdicts = verifying.granted_round({4: own}, report(committed_len, 4, 1))
        assert not verdicts.given and not verdicts.failed
