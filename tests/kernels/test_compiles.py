"""Every kernel compiles for the chips it is meant for, within their shared memory. No GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from outrider.kernels import attention_cuda, attention_wgmma, linear, reject
from outrider.kernels.attention_shapes import HEAD_DIMS, Heads
from outrider.kernels.linear_many import BLOCK_TILES, depth_of
from outrider.kernels.linear_shapes import Epilogue, Tile
from outrider.kernels.linear_wgmma import WgmmaTile, shared_bytes

SOURCES = Path(linear.__file__).parent
# Shared memory that one block may have, in bytes.
LIMITS = {75: 64 << 10, 80: 163 << 10, 90: 227 << 10}
ALIKE = ("embed", "norm", "choose", "accept", "reject", "take", "settle", "follow")
"""Sources without variants."""
SHARED = {"choose": 8 * 256 // 32 + 16, "reject": reject.SHARED}


def variants(arch: int):
    """(source, defines, dynamic shared memory) of everything a forward may launch."""
    bf16 = int(arch >= 80)
    for name in ALIKE:
        yield name, {}, SHARED.get(name, 0)
    for dim in HEAD_DIMS if arch >= 80 else HEAD_DIMS[:2]:
        heads = Heads(8, 2, dim)
        shape = {"HEAD_DIM": dim, "TOKENS": heads.cut}
        yield "attention", shape, attention_cuda.few_rows_shared(heads)
        cut = attention_cuda.many_rows_defines(heads, arch)
        yield "attention_many", shape | cut, attention_cuda.many_rows_shared(heads, cut)
    for groups in (1, 2, 4, 6, 8):
        for epilogue in range(4):
            for tile in (Tile(5, 3), Tile(4, 2, 2)):
                if 8 * groups > linear.most_rows(arch):
                    continue
                gated = epilogue == Epilogue.GATED
                units, stages = linear.cut_for(tile, groups, arch, gated=gated)
                yield (
                    "linear",
                    {
                        "GROUPS": groups,
                        "UNITS": units,
                        "STAGES": stages,
                        "NORM": int(groups <= 2),
                        "EPILOGUE": epilogue,
                        "MIN_BLOCKS": 1,
                        "BF16": bf16,
                    },
                    linear.shared_bytes(groups, units, stages, arch),
                )


def compile_for(name: str, defines: dict[str, int], arch: int, tmp_path: Path) -> bytes:
    defines = {"BF16": int(arch >= 80), **defines}
    try:
        from outrider.kernels.cuda import compile_source

        return compile_source(name, defines, arch=arch)[0]
    except ImportError:
        pass
    if shutil.which("nvcc") is None:
        pytest.skip("neither NVRTC (cuda-bindings) nor nvcc is installed")
    out = tmp_path / "code.cubin"
    flags = [f"-D{key}={value}" for key, value in {**defines, "ARCH": arch}.items()]
    command = ["nvcc", "-std=c++17", f"-arch=sm_{arch}", "-cubin", *flags, "-o", str(out)]
    subprocess.run([*command, str(SOURCES / f"{name}.cu")], check=True, capture_output=True)
    return out.read_bytes()


@pytest.mark.parametrize("arch", LIMITS)
@pytest.mark.parametrize("name", [*ALIKE, "attention", "attention_many", "linear"])
def test_cuda_source_compiles_within_shared_memory(name, arch, tmp_path):
    own = [v for v in variants(arch) if v[0] == name]
    assert own
    for _, _, shared in own:
        assert shared <= LIMITS[arch]
    # All share one template: the largest and the smallest stand for the rest.
    for source, defines, _ in {str(v): v for v in (own[0], own[-1])}.values():
        assert compile_for(source, defines, arch, tmp_path)


def test_compiler_writes_to_no_shared_object(tmp_path):
    """CPython keeps one object for each single byte; the compiler's empty log is one byte."""
    own = next(v for v in variants(90) if v[0] == "embed")
    assert compile_for(own[0], own[1], 90, tmp_path)
    assert [chr(i).encode()[0] for i in range(128)] == list(range(128))


@pytest.mark.parametrize("arch", [75, 90])
def test_linear_uses_the_tensor_cores(arch, tmp_path):
    """What Triton does not give sm_75: its product is plain FMA there."""
    disassembler = _disassembler()
    defines = {
        "GROUPS": 1, "UNITS": 4, "STAGES": 3, "NORM": 1, "EPILOGUE": 0, "MIN_BLOCKS": 1,
    }  # fmt: skip
    code = compile_for("linear", defines, arch, tmp_path)
    (tmp_path / "linear.cubin").write_bytes(code)
    text = subprocess.run(
        [disassembler, "-sass", str(tmp_path / "linear.cubin")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert len(re.findall(r"HMMA\.1688|HMMA\.16816", text)) >= 16
    assert re.search(r"LDG\.E\.128|LDGSTS\.E\.BYPASS(\.LTC\d+B)?\.128", text)


# sm_86 and sm_89 have the instructions of sm_80, and less memory: one of the two for each.
@pytest.mark.parametrize(
    ("arch", "epilogue"),
    [
        *((arch, epilogue) for arch in LIMITS for epilogue in (Epilogue.RESIDUAL, Epilogue.GATED)),
        (86, Epilogue.RESIDUAL),
        (89, Epilogue.GATED),
    ],
)
def test_linear_of_many_rows_uses_the_tensor_cores_and_registers_alone(arch, epilogue, tmp_path):
    disassembler = _disassembler()
    most = {86: 99 << 10, 89: 99 << 10, **LIMITS}[arch]
    for tile in BLOCK_TILES:
        stages, blocks = depth_of(tile, arch)
        assert stages * tile.stage <= most
        if tile == BLOCK_TILES[1] and epilogue != Epilogue.RESIDUAL:
            continue  # the largest and the smallest stand for it
        defines = {
            "BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "STAGES": stages,
            "MIN_BLOCKS": blocks, "EPILOGUE": int(epilogue),
        }  # fmt: skip
        built = tmp_path / "linear_many.cubin"
        built.write_bytes(compile_for("linear_many", defines, arch, tmp_path))
        text = subprocess.run(
            [disassembler, "-sass", str(built)], capture_output=True, text=True, check=True
        ).stdout
        products = tile.rows * tile.columns // 8 // (16 * 8) * 4  # of a warp, for 64 k
        found = len(re.findall("HMMA\\.16816" if arch >= 80 else "HMMA\\.1688", text))
        assert found >= products * (1 if arch >= 80 else 2)
        assert ("LDSM" in text) == (arch >= 90)
        # Between the first product and the last nothing goes to memory and comes back.
        loop = text[text.index("HMMA") : text.rindex("HMMA")]
        assert "LDL" not in loop and "STL" not in loop


@pytest.mark.parametrize("epilogue", [Epilogue.RESIDUAL, Epilogue.GATED])
@pytest.mark.parametrize("tile", [WgmmaTile(2, 6), WgmmaTile(1, 8)], ids=str)
def test_products_on_hopper_stay_under_way_in_registers(tile, epilogue, tmp_path):
    """The compiler says so where it waits for each; memory is no place for their sums."""
    pytest.importorskip("cuda.bindings")
    from outrider.kernels.cuda import compile_source

    assert shared_bytes(tile) <= LIMITS[90]
    code, log = compile_source(
        "linear_wgmma", {"BF16": 1, **tile.defines, "EPILOGUE": int(epilogue)}, arch=90
    )
    assert log == ""
    built = tmp_path / "linear_wgmma.cubin"
    built.write_bytes(code)
    text = subprocess.run(
        [_disassembler(), "-sass", str(built)], capture_output=True, text=True, check=True
    ).stdout
    assert "HGMMA.64x128x16" in text
    assert "LDL" not in text and "STL" not in text


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bf16", [0, 1])
def test_attention_on_hopper_keeps_products_in_flight_and_registers_alone(dim, bf16, tmp_path):
    pytest.importorskip("cuda.bindings.nvrtc")
    from outrider.kernels.cuda import compile_source

    heads = Heads(8, 2, dim)
    assert attention_wgmma.takes(heads, 90, 90)
    assert attention_wgmma.shared_bytes(heads) <= LIMITS[90]
    shape = {"BF16": bf16, "HEAD_DIM": dim, "TOKENS": heads.cut}
    code, log = compile_source("attention_wgmma", shape, arch=90)
    assert "serialized" not in log
    built = tmp_path / "attention_wgmma.cubin"
    built.write_bytes(code)
    usage = subprocess.run(
        [_disassembler(), "-res-usage", str(built)], capture_output=True, text=True, check=True
    ).stdout
    # Outside the registers waits what the end of a span needs, and a word that an item reads once.
    past = 4 * (dim // 8 * 4 + 4)
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    assert past <= int(stack) <= past + 8


@pytest.mark.parametrize("arch", [75, 80, 90])
@pytest.mark.parametrize("module", ["norm", "accept", "choose", "linear", "attention"])
def test_triton_kernel_compiles_within_shared_memory(module, arch):
    triton = pytest.importorskip("triton")
    from importlib import import_module

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kind = "fp16"
    for name, types, constants in SIGNATURES[module]:
        if name == "all_cuts" and arch < 80:
            continue  # Triton's attention is not taken there, and this one takes long to unroll
        function = getattr(import_module(f"outrider.kernels.{module}_triton"), name)
        signature = {p: types.get(p, "i32").replace("T", kind) for p in function.arg_names}
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(function, signature, constexprs=dict(constants))
        built = triton.compile(source, target=GPUTarget("cuda", arch, 32))
        assert built.metadata.shared <= LIMITS[arch]


def _disassembler() -> str:
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton")
        packaged = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        if not packaged.exists():
            pytest.skip("no cuobjdump")
        found = str(packaged)
    return found


_HEADS = {"DIM": 128, "CUT": 64}
_ARENA = {
    **dict.fromkeys(("qkv", "keys", "values", "out", "q_norm", "k_norm"), "*T"),
    **dict.fromkeys(("starts", "prefix_starts", "prefix_lens"), "*i32"),
    **dict.fromkeys(("first_rows", "row_counts", "positions"), "*i32"),
    **dict.fromkeys(("rope", "partial", "stats"), "*fp32"),
    "eps": "fp32",
    "scale": "fp32",
}
SIGNATURES = {
    "norm": [("kernel", {"x": "*T", "weight": "*T", "out": "*T", "eps": "fp32"}, {"BLOCK": 4096})],
    "accept": [
        (
            "kernel",
            dict.fromkeys(("chosen", "tokens", "pending", "proposed", "verdicts"), "*i32"),
            {},
        )
    ],
    "choose": [
        (
            "part",
            {
                "logits": "*fp32", "rows": "*i32", "temperatures": "*fp32", "seeds": "*i64",
                "positions": "*i32", "winners": "*fp32", "ids": "*i32",
            },
            {"ROWS": True, "BLOCK": 2048},
        ),
        ("finish", {"winners": "*fp32", "ids": "*i32", "tokens": "*i32"}, {"BLOCK": 64}),
    ],
    "linear": [
        (
            "kernel",
            {
                **dict.fromkeys(("x", "w", "norm", "bias", "residual", "out"), "*T"),
                "eps": "fp32",
            },
            {
                "K": 3072, "EPILOGUE": epilogue, "NORM": True, "BIAS": False, "BLOCK_N": 16,
                "BLOCK_K": 256, "PRECISION": "tf32",
            },
        )
        for epilogue in (0, 3)
    ],
    "attention": [
        ("append", _ARENA, {"NORM": True, "BRANCHES": True, "DIM": 128}),
        ("cut", _ARENA, {"BRANCHES": True, "PRECISION": "tf32", **_HEADS}),
        ("all_cuts", _ARENA, {"BRANCHES": True, "QUERIES": 64, "PRECISION": "tf32", **_HEADS}),
        ("combine", _ARENA, _HEADS),
    ],
}  # fmt: skip
