"""What each command imports: nobody waits for libraries that a command has no use for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from outrider.coordinator.profile.record import build
from outrider.protos import generation_pb2 as pb

HEAVY = ("google.protobuf", "grpc", "numpy", "opentelemetry", "tokenizers", "torch", "transformers")
GRPC = {"google.protobuf", "grpc"}
PROGRAM = f"""
import sys
from outrider.coordinator.cli.main import main
try:
    status = main()
except SystemExit as end:
    status = end.code or 0
print(status, *(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)
"""


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "x.json"
    text = {
        "prompt": "p", "text": "", "token_ids": [], "origins": [], "pieces": [], "deltas": [],
        "prompt_tokens": 1, "seed": 7,
    }  # fmt: skip
    path.write_text(json.dumps(build(pb.ProfileResponse(), text)))
    return path


@pytest.mark.parametrize(
    ("words", "status", "needs"),
    [
        ("--help", 0, set()),
        ("--version", 0, set()),
        ("report FILE", 0, set()),
        ("profile FILE", 0, set()),
        ("profile FILE --json", 0, set()),
        ("profile FILE --chrome FILE.trace", 0, set()),
        ("plan --gpu t4 --base llama-3.2-1b", 0, set()),
        ("generate --help", 0, set()),
        ("generate x --k 99", 2, GRPC),
        ("generate x --target unix:/no/such", 1, GRPC),
        ("info --help", 0, set()),
        ("info --target unix:/no/such", 1, GRPC),
        ("serve coordinator --help", 0, set()),
        ("up --help", 0, set()),
        ("up --device nowhere", 2, set()),
        ("bench --help", 0, set()),
        ("bench step --help", 0, set()),
        ("bench arena --help", 0, set()),
        ("bench links --help", 0, GRPC),
        ("bench tracing --help", 0, GRPC),
        ("doctor", 0, {"numpy", "torch"}),
    ],
)
def test_command_imports_only_what_it_needs(
    words: str, status: int, needs: set[str], profile: Path
) -> None:
    command = words.replace("FILE", str(profile)).split()
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, *command],
        capture_output=True,
        text=True,
        timeout=120,
    )
    ended, *imported = done.stderr.splitlines()[-1].split()
    assert ended == str(status), done.stderr
    assert set(imported) <= needs, f"`outrider {words}` imports {imported}"
