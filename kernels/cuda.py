"""CUDA C++ sources compiled at run time through NVRTC, and launched.

Uses the maintained bindings (``cuda-bindings``, which torch's CUDA builds and ``cuda-core``
bring along), imported only when something is compiled. No toolkit, no header, no nvcc.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SOURCES = Path(__file__).parent

Argument = torch.Tensor | int | float | None


class CudaError(RuntimeError):
    """A call into the CUDA driver or NVRTC failed; the message names the call and the reason."""


def available() -> str | None:
    """None where sources can be compiled here, else the reason why not."""
    try:
        from cuda.bindings import driver, nvrtc  # noqa: F401
    except ImportError as error:
        return f"the package cuda-bindings is missing ({error}); pip install 'outrider[cuda]'"
    return None


def compile_source(
    name: str, defines: Mapping[str, int], *, arch: int, to: str = "cubin"
) -> tuple[bytes, str]:
    """Compiles ``<name>.cu`` for compute capability ``arch`` / 10; gives (code, compiler's log).

    ``to``: "cubin" (machine code) or "ptx" (which the driver translates for a later chip).
    Raises CudaError with the compiler's log when it does not compile.
    """
    from cuda.bindings import nvrtc

    source = (SOURCES / f"{name}.cu").read_bytes()
    headers = sorted(SOURCES.glob("*.cuh"))
    error, program = nvrtc.nvrtcCreateProgram(
        source,
        f"{name}.cu".encode(),
        len(headers),
        [h.read_bytes() for h in headers],
        [h.name.encode() for h in headers],
    )
    _check("nvrtcCreateProgram", error)
    kind = "sm" if to == "cubin" else "compute"
    # What only this one line of chips has (wgmma) is in no PTX that others could take.
    only = "a" if arch == 90 and to == "cubin" else ""
    options = [f"--gpu-architecture={kind}_{arch}{only}", "--std=c++17", f"-DARCH={arch}"]
    options += [f"-D{key}={value}" for key, value in sorted(defines.items())]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = _room(size)
    nvrtc.nvrtcGetProgramLog(program, log)
    text = log[:size].decode(errors="replace").strip("\0 \n")
    if int(status) != 0:
        nvrtc.nvrtcDestroyProgram(program)
        raise CudaError(f"{name}.cu {dict(defines)} sm_{arch}: does not compile\n{text}")
    get_size, get = (
        (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
        if to == "cubin"
        else (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
    )
    _, size = get_size(program)
    code = _room(size)
    _check("nvrtcGetCode", *get(program, code))
    nvrtc.nvrtcDestroyProgram(program)
    return code[:size], text


def _room(size: int) -> bytes:
    """``size`` bytes and a few more for the compiler to write to.

    Never a single byte: that object is shared by the whole interpreter, and an empty log is one.
    """
    return bytes(size + 2)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One compiled kernel: ``threads`` a block, ``shared`` bytes of shared memory a block."""

    function: Any
    threads: int
    shared: int
    overlaps: bool

    def launch(self, grid: Sequence[int], arguments: Sequence[Argument], *, overlap: bool) -> None:
        """Starts the kernel on torch's current stream.

        ``overlap``: its blocks may be placed before the kernel ahead of it is complete
        (programmatic dependent launch; ignored where the chip has none).
        """
        from cuda.bindings import driver

        values: list[int | float] = []
        types: list[Any] = []
        for a in arguments:
            if a is None:
                values.append(0)
                types.append(ctypes.c_void_p)
            elif isinstance(a, torch.Tensor):
                values.append(a.data_ptr())
                types.append(ctypes.c_void_p)
            elif isinstance(a, float):
                values.append(a)
                types.append(ctypes.c_float)
            else:
                values.append(a)
                types.append(ctypes.c_int)
        config = driver.CUlaunchConfig()
        config.gridDimX = grid[0]
        config.gridDimY = grid[1] if len(grid) > 1 else 1
        config.gridDimZ = 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self.threads, 1, 1
        config.sharedMemBytes = self.shared
        config.hStream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
        if overlap and self.overlaps:
            attribute = driver.CUlaunchAttribute()
            attribute.id = (
                driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            )
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs = [attribute]
            config.numAttrs = 1
        else:
            config.numAttrs = 0
        (error,) = driver.cuLaunchKernelEx(config, self.function, (tuple(values), tuple(types)), 0)
        _check("cuLaunchKernelEx", error)


class Compiler:
    """Compiles each (source, defines) once for one device and keeps the result loaded."""

    def __init__(self, device: torch.device, *, arch: int | None = None) -> None:
        """``arch``: compile for an older chip than the device, through PTX (for tests)."""
        major, minor = torch.cuda.get_device_capability(device)
        self.device = device
        self.chip = major * 10 + minor
        # Code for the newest chip these sources know instructions of; newer ones take its PTX.
        known = [a for a in (75, 80, 86, 87, 89, 90) if a <= self.chip]
        self.arch = arch if arch is not None else known[-1]
        self._kernels: dict[tuple[object, ...], Kernel] = {}
        self._maps: dict[tuple[object, ...], torch.Tensor] = {}

    def tile_map(self, matrix: torch.Tensor, rows: int) -> torch.Tensor:
        """What Hopper's copy engine must know to fetch tiles of ``rows`` rows by 64 columns.

        ``matrix``: contiguous [any, a multiple of 8] of a 16-bit type. The result lies on the
        device and stays there, since captured graphs go on using it.
        """
        key = (matrix.data_ptr(), tuple(matrix.shape), matrix.dtype, rows)
        if key not in self._maps:
            self._maps[key] = self._describe(matrix, rows)
        return self._maps[key]

    @staticmethod
    def _describe(matrix: torch.Tensor, rows: int) -> torch.Tensor:
        from cuda.bindings import driver

        kinds = driver.CUtensorMapDataType
        half = matrix.dtype == torch.float16
        error, made = driver.cuTensorMapEncodeTiled(
            kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
            if half
            else kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            2,
            matrix.data_ptr(),
            [driver.cuuint64_t(matrix.shape[1]), driver.cuuint64_t(matrix.shape[0])],
            [driver.cuuint64_t(matrix.shape[1] * 2)],
            [driver.cuuint32_t(64), driver.cuuint32_t(rows)],
            [driver.cuuint32_t(1), driver.cuuint32_t(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        _check("cuTensorMapEncodeTiled", error)
        words = [int(word) for word in made.opaque]
        return torch.tensor(words, dtype=torch.uint64).to(matrix.device)

    def kernel(
        self, name: str, entry: str, defines: Mapping[str, int], *, threads: int, shared: int
    ) -> Kernel:
        """The kernel ``entry`` of ``<name>.cu``; raises CudaError when it can't be had."""
        key = (name, entry, tuple(sorted(defines.items())), threads, shared)
        if key not in self._kernels:
            self._kernels[key] = self._load(name, entry, defines, threads, shared)
        return self._kernels[key]

    def _load(
        self, name: str, entry: str, defines: Mapping[str, int], threads: int, shared: int
    ) -> Kernel:
        from cuda.bindings import driver

        torch.cuda.current_stream(self.device)  # the device's context exists from here on
        code, _ = compile_source(
            name, defines, arch=self.arch, to="cubin" if self.arch == self.chip else "ptx"
        )
        error, module = driver.cuModuleLoadData(code)
        _check(f"cuModuleLoadData({name})", error)
        error, function = driver.cuModuleGetFunction(module, entry.encode())
        _check(f"cuModuleGetFunction({entry})", error)
        if shared > 48 * 1024:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            (error,) = driver.cuFuncSetAttribute(function, attribute, shared)
            _check(f"cuFuncSetAttribute({entry}, {shared} bytes of shared memory)", error)
        return Kernel(function, threads, shared, overlaps=self.arch >= 90)


def _check(what: str, error: Any, *_: object) -> None:
    if int(error) != 0:
        raise CudaError(f"{what}: {error!r}")
