"""The protocol's model, checked exhaustively by SPIN, and mutations of it that must be caught.

``docs/design/protocol.pml`` says what is modelled. With ``OUTRIDER_MODELS=large`` the bounds are
those of the page beside it; else two of the networks have smaller ones.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

MODEL = "protocol.pml"

HOLDS: dict[str, tuple[tuple[str, ...], bool, int]] = {
    "hostile": (("NEW=3", "KMAX=2", "FAULTS=2"), True, 2_000_000),
    "hostile, any rule": (("ANY_RULE", "NEW=2", "KMAX=1", "FAULTS=2"), False, 300_000),
    "stream": (("STREAM", "NEW=3", "KMAX=2", "FAULTS=2"), True, 60_000),
    "stream, any rule": (("STREAM", "ANY_RULE", "NEW=3", "KMAX=2", "FAULTS=2"), True, 150_000),
}
if os.environ.get("OUTRIDER_MODELS") == "large":
    HOLDS |= {
        "hostile, any rule": (("ANY_RULE", "NEW=2", "KMAX=2", "FAULTS=2"), False, 2_000_000),
        "stream": (("STREAM", "NEW=4", "KMAX=2", "FAULTS=3"), True, 600_000),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", HOLDS)
def test_protocol_model_holds_exhaustively(name: str, check: Any) -> None:
    defines, liveness, at_least = HOLDS[name]
    report = check(*defines, liveness=liveness)
    assert report.violation == ""
    assert report.errors == 0
    assert report.complete
    assert report.states > at_least, "the model has shrunk: is it still the protocol?"
    if name == "hostile":
        # Every other statement was executed, so what holds does not hold for want of events.
        assert set(report.unreached) == {"-end-", "assert((kind!=KV_MISSING))"}


WRONG_DRAFT_LOG = "assertion violated (judged==((1<<n)|"
WRONG_VERDICT = "assertion violated (judged==((1<<(n+k))|"
REFUSED = "assertion violated (kind!=1)"  # 1 is KV_MISSING: base_len beyond what is held
HOLE = "assertion violated (draft.kv[i]=="
NEVER_ENDS = "acceptance cycle"

CAUGHT = {
    "service takes messages of older epochs": (("MUTATE_NO_EPOCH_CHECK",), WRONG_DRAFT_LOG),
    "service serves old rounds again": (("MUTATE_NO_ROUND_CHECK",), WRONG_DRAFT_LOG),
    "answers of older epochs count": (
        ("KMAX=0", "MUTATE_NO_ANSWER_EPOCH_CHECK"),
        WRONG_VERDICT,
    ),
    "answers to old rounds count": (("KMAX=0", "MUTATE_NO_ANSWER_ROUND_CHECK"), WRONG_VERDICT),
    "service does not roll back": (("MUTATE_NO_ROLLBACK",), WRONG_DRAFT_LOG),
    "draft not rolled back after full acceptance": (
        ("MUTATE_NO_ROLLBACK_AFTER_FULL_ACCEPT",),
        REFUSED,
    ),
    "the same, and the service trusts base_len": (
        ("MUTATE_NO_ROLLBACK_AFTER_FULL_ACCEPT", "MUTATE_NO_KV_CHECK"),
        HOLE,
    ),
    "the same, on a stream": (("STREAM", "MUTATE_NO_ROLLBACK_AFTER_FULL_ACCEPT"), REFUSED),
    "verifier keeps rejected tokens": (("MUTATE_VERIFIER_KEEPS_REJECTED",), REFUSED),
    "base_len survives a re-open": (("MUTATE_KEEP_BASE_ON_REOPEN",), REFUSED),
    "requests reach the successor of a dead process": (
        ("MUTATE_REQUESTS_OUTLIVE_CRASH",),
        WRONG_DRAFT_LOG,
    ),
    "a stream loses a message and lives on": (
        ("STREAM", "MUTATE_LOSS_WITHOUT_END"),
        WRONG_DRAFT_LOG,
    ),
    "lost sequences are not opened anew": (("MUTATE_NO_REOPEN",), NEVER_ENDS),
    "nobody notices a lost message": (("MUTATE_NO_TIMEOUT",), NEVER_ENDS),
}


@pytest.mark.parametrize("name", CAUGHT)
def test_protocol_mutation_is_caught(name: str, check: Any) -> None:
    defines, objection = CAUGHT[name]
    report = check(*defines, optimise="-O0")
    assert report.errors > 0
    assert objection in report.violation
