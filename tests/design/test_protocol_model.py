"""The protocol's model, checked exhaustively by SPIN, and mutations of it that must be caught.

``docs/design/protocol.pml`` says what is modelled. Needs ``spin`` and ``gcc`` (Debian: both are
packages of those names; gcc compiles the checker that spin writes).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

MODEL = Path(__file__).parents[2] / "docs" / "design" / "protocol.pml"
MISSING = [tool for tool in ("spin", "gcc") if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"needs {' and '.join(MISSING)} on the path (apt-get install spin gcc)"
)
MEMORY_MIB = 1900


@dataclass(frozen=True)
class Report:
    """What the checker said."""

    errors: int
    complete: bool
    states: int
    violation: str
    unreached: tuple[str, ...]


def check(folder: Path, *defines: str, liveness: bool = True, optimise: str = "-O1") -> Report:
    """Searches the whole state space; stops at the first violation.

    With ``liveness`` the claim "every request ends" is checked too, in every interleaving
    (without assuming fairness); a deadlock breaks it as well. Without, assertions and
    deadlocks are checked, at half the cost.
    """
    flags = [f"-D{name}" for name in defines]
    _run(folder, "spin", "-a", *flags, str(MODEL))
    mode = ["-DNOFAIR"] if liveness else ["-DSAFETY", "-DNOCLAIM"]
    _run(folder, "gcc", optimise, "-w", "-DCOLLAPSE", f"-DMEMLIM={MEMORY_MIB}", *mode,
         "-o", "pan", "pan.c")  # fmt: skip
    output = _run(folder, "./pan", "-m20000", *(["-a"] if liveness else []))
    errors = re.search(r"errors: (\d+)", output)
    states = re.search(r"(\d+) states, stored", output)
    violation = re.search(r"pan:1: (.*)", output)
    assert errors and states, output
    return Report(
        errors=int(errors[1]),
        complete="Search not completed" not in output and "max search depth" not in output,
        states=int(states[1]),
        violation=violation[1] if violation else "",
        unreached=tuple(re.findall(r'state \d+, "(.*)"', output)),
    )


def _run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=250)
    # SPIN's own tools report on stdout and end with 0 also where they object.
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


HOLDS = {
    "hostile": (("NEW=3", "KMAX=2", "FAULTS=2"), True, 2_000_000),
    "hostile, any rule": (("ANY_RULE", "NEW=2", "KMAX=2", "FAULTS=2"), False, 2_000_000),
    "stream": (("STREAM", "NEW=4", "KMAX=2", "FAULTS=3"), True, 600_000),
    "stream, any rule": (("STREAM", "ANY_RULE", "NEW=3", "KMAX=2", "FAULTS=2"), True, 150_000),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOLDS)
def test_protocol_model_holds_exhaustively(name: str, tmp_path: Path) -> None:
    defines, liveness, at_least = HOLDS[name]
    report = check(tmp_path, *defines, liveness=liveness)
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
def test_protocol_mutation_is_caught(name: str, tmp_path: Path) -> None:
    defines, objection = CAUGHT[name]
    report = check(tmp_path, *defines, optimise="-O0")
    assert report.errors > 0
    assert objection in report.violation
