"""The committed stubs are what the protos generate."""

from __future__ import annotations

from pathlib import Path

from outrider.protos.generate import PROTOS, generate

FOLDER = Path(__file__).parents[2] / "protos"


def test_stubs_are_generated_from_the_protos(tmp_path: Path) -> None:
    made = generate(tmp_path)
    kinds = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")
    assert {path.name for path in made} == {
        Path(name).stem + kind for name in PROTOS for kind in kinds
    }
    assert set(PROTOS) == {path.name for path in FOLDER.glob("*.proto")}
    for path in made:
        committed = FOLDER / path.name
        assert path.read_bytes() == committed.read_bytes(), (
            f"{committed.name} differs: run `python -m outrider.protos.generate`"
        )
