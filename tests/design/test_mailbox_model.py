"""The mailbox's model, checked exhaustively by SPIN, and mutations of it that must be caught.

``docs/design/mailbox.pml`` says what is modelled.
"""

from __future__ import annotations

from typing import Any

import pytest

MODEL = "mailbox.pml"

HOLDS = {
    "a fault": ((), 1_500_000),
    "three grants, no fault": (("GRANTS=3", "FAULTS=0"), 300_000),
}


@pytest.mark.parametrize("name", HOLDS)
def test_mailbox_model_holds_exhaustively(name: str, check: Any) -> None:
    defines, at_least = HOLDS[name]
    report = check(*defines)
    assert report.violation == ""
    assert report.errors == 0
    assert report.complete
    assert report.states > at_least, "the model has shrunk: is it still the mailbox?"
    if name == "a fault":
        # Every statement was executed, so what holds does not hold for want of events.
        assert set(report.unreached) == {"-end-"}


NOT_OF_THIS_TURN = "assertion violated (body==("
NOT_OF_THIS_GRANT = ")==grant)"
FROM_THE_FUTURE = "assertion violated (turn<("
WAITS_FOR_EVER = "acceptance cycle"

CAUGHT = {
    "what is heard counts for any turn": ("NO_TURN_CHECK", 2, NOT_OF_THIS_GRANT),
    "a slot is read while it is written": ("NO_SEAL", 2, FROM_THE_FUTURE),
    "what is checked is not what is used": ("SEAL_OF_ANOTHER_LOOK", 2, FROM_THE_FUTURE),
    "one who left early breaks the protocol": ("NO_EARLY_LEAVE", 2, FROM_THE_FUTURE),
    "the draft goes on after the end": ("ENDS_IGNORED", 2, NOT_OF_THIS_TURN),
    "the draft is not told of the end": ("NO_ENDS", 1, WAITS_FOR_EVER),
    "a late draft is not told of the end": ("LATE_WITHOUT_A_WORD", 1, WAITS_FOR_EVER),
    "nobody notices that the other side hung up": ("NO_HANG_UP", 1, WAITS_FOR_EVER),
}


@pytest.mark.parametrize("name", CAUGHT)
def test_mailbox_mutation_is_caught(name: str, check: Any) -> None:
    mutation, grants, objection = CAUGHT[name]
    defines = (f"MUTATE_{mutation}", f"GRANTS={grants}", "ROUNDS=1")
    report = check(*defines, optimise="-O0")
    assert report.errors > 0
    assert objection in report.violation
