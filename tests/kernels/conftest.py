"""CUDA sources run on the host: `emulated` compiles them with g++ against emulation.h."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "kernels"


class EmulatedKernel:
    """Stands in for kernels.cuda.Kernel."""

    def __init__(self, library: ctypes.CDLL, pointers: list[bool], threads: int, shared: int):
        self.library, self.pointers = library, pointers
        self.threads, self.shared, self.late = threads, shared, 1

    def launch(self, grid: Sequence[int], arguments: Sequence[object], *, overlap: bool) -> None:
        assert len(arguments) == len(self.pointers)
        values: list[object] = []
        for a, pointer in zip(arguments, self.pointers, strict=True):
            assert pointer == (a is None or isinstance(a, torch.Tensor)), a
            if isinstance(a, torch.Tensor):
                values.append(ctypes.c_void_p(a.data_ptr()))
            elif a is None:
                values.append(ctypes.c_void_p(0))
            else:
                values.append(ctypes.c_float(a) if isinstance(a, float) else ctypes.c_int(a))
        gy = grid[1] if len(grid) > 1 else 1
        self.library.run(grid[0], gy, self.threads, self.shared, self.late, *values)


class EmulatedCompiler:
    """Stands in for kernels.cuda.Compiler."""

    def __init__(self, folder: Path, arch: int = 90) -> None:
        self.folder, self.arch, self.chip, self.late = folder, arch, arch, 1
        self.sources = SOURCES

    def kernel(
        self, name: str, entry: str, defines: Mapping[str, int], *, threads: int, shared: int
    ) -> EmulatedKernel:
        source = (self.sources / f"{name}.cu").read_text()
        found = re.search(rf"\b{entry}\(([^)]*)\)\s*\{{", source)
        assert found is not None, entry
        parameters = [p.strip() for p in found[1].split(",")]
        names = [re.split(r"[\s*]+", p)[-1] for p in parameters]
        text = (
            f'#include "{HERE / "emulation.h"}"\n#include "{self.sources / name}.cu"\n'
            f'extern "C" void run(int gx, int gy, int threads, int shared, int late, '
            f"{', '.join(parameters)}) {{\n"
            f"  auto body = [&] {{ {entry}({', '.join(names)}); }};\n"
            f"  run_grid(gx, gy, threads, shared, late, body);\n}}\n"
        )
        flags = [f"-D{k}={v}" for k, v in {**defines, "ARCH": self.arch}.items()]
        # By what is compiled, wherever it lies: a changed copy of one header leaves the kernels
        # alone that do not include it.
        content = [entry, str(flags), (HERE / "emulation.h").read_text(), *self._included(source)]
        key = hashlib.sha256("\0".join(content).encode()).hexdigest()[:16]
        library = self.folder / f"{name}-{key}.so"
        with library.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be compiling the same
            if not library.exists():
                self._compile(text, flags, library)
        kernel = EmulatedKernel(
            ctypes.CDLL(str(library)), ["*" in p for p in parameters], threads, shared
        )
        kernel.late = self.late
        return kernel

    def _included(self, source: str) -> Iterator[str]:
        """A source, and every header that it includes, directly or not."""
        names, texts = [""], {"": source}
        for name in names:
            for header in re.findall(r'^#include "(\w+\.cuh)"', texts[name], re.MULTILINE):
                if header not in texts:
                    texts[header] = (self.sources / header).read_text()
                    names.append(header)
        yield from (texts[name] for name in names)

    @staticmethod
    def tile_map(matrix: torch.Tensor, rows: int) -> torch.Tensor:
        """Stands in for kernels.cuda.Compiler.tile_map: emulation.h's Tiles."""
        own, columns = matrix.shape
        return torch.tensor([matrix.data_ptr(), columns, own, rows])

    def _compile(self, text: str, flags: Sequence[str], library: Path) -> None:
        unit, made = library.with_suffix(".cpp"), library.with_suffix(".part")
        unit.write_text(text)
        # Most of these run for less time than more optimisation would take.
        command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-w", "-U_FORTIFY_SOURCE"]
        subprocess.run(
            [*command, *flags, f"-I{self.sources}", str(unit), "-o", str(made)], check=True
        )
        made.rename(library)


@pytest.fixture(scope="session")
def emulated(pytestconfig: pytest.Config) -> Callable[..., EmulatedCompiler]:
    """Makes an EmulatedCompiler for a chip (default sm_90).

    What it compiles is kept, by content, for the other workers and the next runs.
    """
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    folder = pytestconfig.cache.mkdir("emulated")
    return lambda arch=90: EmulatedCompiler(folder, arch)
