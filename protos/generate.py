"""Regenerates the stubs: ``python -m outrider.protos.generate [folder]``.

Needs grpcio-tools 1.80: stubs of that release load on it and on every later grpcio and
protobuf, which newer generators do not promise. And mypy-protobuf, for the types of what
grpcio-tools leaves without: the clients and servicers.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

PROTOS = ("generation.proto", "speculation.proto")


def generate(folder: Path) -> list[Path]:
    """Writes ``*_pb2.py`` and ``*_pb2_grpc.py``, with a ``.pyi`` each, into ``folder``."""
    from grpc_tools import protoc  # a development dependency

    source = Path(__file__).parent
    types = Path(sysconfig.get_path("scripts"), "protoc-gen-mypy_grpc")
    with tempfile.TemporaryDirectory() as scratch:
        code = protoc.main(
            [
                "protoc",
                f"-Ioutrider/protos={source}",
                f"--python_out={scratch}",
                f"--pyi_out={scratch}",
                f"--grpc_python_out={scratch}",
                f"--plugin=protoc-gen-mypy_grpc={types}",
                f"--mypy_grpc_out=quiet:{scratch}",
                *(f"outrider/protos/{name}" for name in PROTOS),
            ]
        )
        if code:
            raise RuntimeError(f"protoc ended with status {code}")
        made = sorted(Path(scratch, "outrider", "protos").iterdir())
        return [Path(shutil.copy(path, folder / path.name)) for path in made]


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for path in generate(target):
        print(path)
