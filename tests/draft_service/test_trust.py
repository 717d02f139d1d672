"""How many tokens are proposed, and what is learnt from what became of them."""

from __future__ import annotations

import pytest

from outrider.draft_service.ngram.trust import MOST, PRIOR, Trust


def taught(match_len: int, accepted: int, of: int, times: int) -> Trust:
    """After ``times`` proposals of ``of`` tokens of which ``accepted`` came true."""
    trust = Trust()
    for _ in range(times):
        trust.proposed(match_len, 1, [5] * of)
        trust.learn([9, *[5] * accepted, 6])
    return trust


def test_trust_grows_with_the_match() -> None:
    lengths = [1, 2, 4, 8, 16, 32]
    counts = [Trust().tokens(length) for length in lengths]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] <= MOST
    assert len(PRIOR) == len(lengths) and len(set(counts)) > 3


@pytest.mark.parametrize("match_len", [1, 2, 5, 9, 20, 500])
def test_trust_follows_what_is_accepted(match_len: int) -> None:
    before = Trust().tokens(match_len)
    assert taught(match_len, 4, 4, times=60).tokens(match_len) == MOST
    assert taught(match_len, 0, 4, times=60).tokens(match_len) == 1
    assert taught(match_len, 4, 4, times=1).tokens(match_len) >= before
    # Matches of another class are another matter.
    other = 1 if match_len > 1 else 500
    assert taught(match_len, 0, 4, times=60).tokens(other) == Trust().tokens(other)


def test_trust_learns_from_each_proposal_once_and_only_when_it_is_judged() -> None:
    trust = Trust()
    trust.proposed(3, 2, [5, 6])
    before = trust.tokens(3)
    for _ in range(50):
        trust.learn([1, 2])  # the log has not gone on
    assert trust.tokens(3) == before
    trust.learn([1, 2, 0])
    once = taught(3, 0, 2, times=1)
    for _ in range(50):
        trust.learn([1, 2, 0, 0])
    assert trust.tokens(3) == once.tokens(3)
    assert (trust._hits, trust._tries) == (once._hits, once._tries)


def test_trust_says_nothing_of_tokens_that_the_text_did_not_come_to() -> None:
    cut, whole = Trust(), Trust()
    cut.proposed(3, 1, [5, 6, 7, 8])
    cut.learn([1, 5, 6])
    whole.proposed(3, 1, [5, 6])
    whole.learn([1, 5, 6, 7])
    assert (cut._hits, cut._tries) == (whole._hits, whole._tries)


def test_trust_of_an_empty_proposal_learns_nothing() -> None:
    trust = Trust()
    trust.proposed(3, 1, [5])
    trust.proposed(3, 1, [])
    trust.learn([1, 2, 3])
    assert (trust._hits, trust._tries) == (Trust()._hits, Trust()._tries)
