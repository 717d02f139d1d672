"""Compiles the CPU kernels for the processor at hand, and keeps what was compiled on disk.

No compiler is needed on the machine: LLVM comes in the package llvmlite.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
from pathlib import Path
from typing import Any

from outrider.kernels.cpu.keeping import keep
from outrider.kernels.cpu.shape import KernelShape
from outrider.kernels.cpu.team import openmp

_X86 = ("x86_64", "amd64")
_ARM = ("aarch64", "arm64")
_DIGEST = hashlib.sha256().digest_size


def why_not() -> str | None:
    """Why the kernels can't be compiled here; None where they can."""
    try:
        import llvmlite.binding as llvm
    except (ImportError, OSError) as error:
        return f"the package llvmlite can't be loaded ({error})"
    machine = platform.machine().lower()
    if os.name != "posix" or machine not in (*_X86, *_ARM):
        return f"there are none for {platform.system()} on {machine}"
    features = llvm.get_host_cpu_features()
    # Without these instructions every multiply-add, or every conversion, would be a call.
    if machine in _X86 and not (features.get("fma") and features.get("f16c")):
        return "the processor has no fused multiply-add"
    return None


def processor_name() -> str:
    """The processor as LLVM calls it: ``znver4``."""
    import llvmlite.binding as llvm

    name: str = llvm.get_host_cpu_name()
    return name


def processor() -> str:
    """The processor with the instructions that it has."""
    return f"{processor_name()} {_flags()}"


def description(columns: int) -> str:
    """What is compiled here, for people to read."""
    return f"compiled for {processor_name()}, {columns} columns"


def vector_lanes() -> int:
    """Floats in one register of this processor."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    if features.get("avx512f") and features.get("avx512vl"):
        return 16
    return 8 if features.get("avx2") else 4


def write(shape: KernelShape) -> str:
    """The module for ``shape`` as LLVM's text."""
    from outrider.kernels.cpu.forward import write_forward
    from outrider.kernels.cpu.language import ir

    module = ir.Module("outrider")
    write_forward(module, shape, "yield" if platform.machine().lower() in _ARM else "pause")
    return str(module)


class CompiledForward:
    """The functions of ``forward``, compiled."""

    def __init__(self, shape: KernelShape, kept: Path | None = None) -> None:
        """``kept``: the folder for compiled code; None keeps none."""
        place = kept / f"{_key(shape)}.o" if kept is not None else None
        code = _read(place)
        if code is None:
            code = optimised(write(shape))
            if place is not None:
                keep(place, hashlib.sha256(code).digest() + code)
        # It owns the machine code, which must live as long as it may be called.
        self._engine = loaded(code)
        self._together = self._engine.get_function_address("together")
        self._alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(
            self._engine.get_function_address("alone")
        )

    def __call__(self, tables: int, threads: int) -> None:
        """Runs with the three words at the address ``tables``; see ``write_forward``."""
        library = openmp() if threads > 1 else None
        if library is None:
            self._alone(tables)
        else:
            library.GOMP_parallel(self._together, tables, threads, 0)


def optimised(text: str) -> bytes:
    """A module's text as machine code for this processor."""
    import llvmlite.binding as llvm

    machine = _machine()
    module = llvm.parse_assembly(text)
    module.triple = machine.triple
    module.data_layout = str(machine.target_data)
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    code: bytes = machine.emit_object(module)
    return code


def loaded(code: bytes) -> Any:
    """Machine code made callable: an engine that knows its functions' addresses."""
    import llvmlite.binding as llvm

    machine = _machine()
    empty = llvm.parse_assembly("")
    empty.triple = machine.triple
    engine = llvm.create_mcjit_compiler(empty, machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine


def _machine() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=_flags(), opt=3, jit=True
    )


def _flags() -> str:
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    flags: str = features.flatten()
    # The code asks for wide registers itself; a rule of the compiler would halve them.
    return f"{flags},-prefer-256-bit" if features.get("avx512f") else flags


def _key(shape: KernelShape) -> str:
    """Names everything that the machine code depends on: these sources, LLVM, the processor."""
    import llvmlite

    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    digest.update(f"{shape} {llvmlite.__version__} {processor()}".encode())
    return f"cpu-{digest.hexdigest()[:32]}"


def _read(place: Path | None) -> bytes | None:
    """What was kept; None where nothing was, or not the whole of it: it would be run as it is."""
    try:
        kept = place.read_bytes() if place is not None else b""
    except OSError:
        return None
    digest, code = kept[:_DIGEST], kept[_DIGEST:]
    return code if code and hashlib.sha256(code).digest() == digest else None
