"""Linear layers: ``out = epilogue(norm(x) wᵀ + bias)``.

Whatever the number of rows, a row's result is the same bits: one order of summation for all
(``linear.cu`` says which). Few rows are bound by reading ``w`` once, many by arithmetic: each has
its kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from outrider.kernels import norm as rms
from outrider.kernels.linear_many import ManyLinear
from outrider.kernels.linear_shapes import FEW_ROWS, PLAIN, Epilogue, Tile, shared_limit
from outrider.kernels.linear_wgmma import WgmmaLinear, worth
from outrider.kernels.operation import (
    Arguments,
    Call,
    Implementation,
    Operation,
    Tools,
    always,
    no_cuda_source,
    no_triton,
)

_GROUPS = (1, 2, 4, 6, 8)
"""Groups of eight rows that ``linear.cu`` is compiled for."""


def reference(
    *,
    x: Tensor,
    w: Tensor,
    out: Tensor,
    rows: int,
    epilogue: Epilogue = Epilogue.STORE,
    norm: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    tile: Tile = PLAIN,
    overlap: bool = False,
) -> None:
    """``x`` [at least rows, in], ``w`` [columns, in], ``out`` [at least rows, columns].

    For ``GATED`` ``w`` is [2 columns, in]. ``norm`` [in]: x is RMS-normalised with it first.
    Rounds to x's type where a chain of separate layers would. ``overlap`` is a hint.
    """
    if norm is not None:
        normed = torch.empty_like(x)
        rms.reference(x=x, weight=norm, out=normed, rows=rows, eps=eps)
        x = normed
    y = functional.linear(x[:rows].float(), w.float())
    if bias is not None:
        y += bias.float()
    if epilogue == Epilogue.STORE_FLOAT:
        out[:rows] = y
        return
    y = y.to(w.dtype)
    if epilogue == Epilogue.GATED:
        gate, up = y.chunk(2, dim=-1)
        out[:rows] = functional.silu(gate) * up
    elif epilogue == Epilogue.RESIDUAL:
        assert residual is not None
        out[:rows] = residual[:rows] + y
    else:
        out[:rows] = y


def row_groups(rows: int) -> int:
    """Groups of eight rows that the kernel for ``rows`` is made for; raises above 64."""
    if not 1 <= rows <= FEW_ROWS:
        raise ValueError(f"rows: got {rows}; must be in 1..{FEW_ROWS}")
    return next(g for g in _GROUPS if rows <= 8 * g)


def shared_bytes(groups: int, units: int, stages: int, arch: int) -> int:
    """Shared memory of one block."""
    parts, rows = 4 if groups >= 4 else 8, 8 * groups
    stage = (units + (groups if groups >= 4 else 0)) * 1024
    ring = 8 * stages * stage if arch >= 80 else 0
    return parts * units * rows * 8 * 4 + 8 * rows * 4 + ring


def cut_for(
    tile: Tile, groups: int, arch: int, chip: int | None = None, *, gated: bool = False
) -> tuple[int, int]:
    """(units, stages) that fit registers and shared memory for so many rows on this chip.

    ``arch``: what the code is compiled for; ``chip``: what it runs on, where that is another.
    ``gated``: units are a whole number of pairs. Raises ``ValueError`` where none fit, see
    ``most_rows``.
    """
    limit, least = shared_limit(arch, chip), 2 if gated else 1
    if arch < 80:
        units, stages = min(tile.units, 4 if groups <= 2 else 2), 2
    else:
        units = tile.units if groups == 1 else min(tile.units, 8 if groups == 2 else 4)
        stages = tile.stages
    units = max(least, units - units % least)
    while shared_bytes(groups, units, stages, arch) > limit:
        if stages > 2:
            stages -= 1
        elif units > least:
            units -= least
        else:
            raise ValueError(f"{8 * groups} rows don't fit the {limit} bytes of one block")
    return units, stages


@lru_cache
def most_rows(arch: int, chip: int | None = None) -> int:
    """Rows that ``linear.cu`` takes on this chip, see ``cut_for``; a multiple of 8."""
    limit = shared_limit(arch, chip)
    return max(8 * g for g in _GROUPS if shared_bytes(g, 2, 2, arch) <= limit)


def why_not_shape(w: Tensor) -> str | None:
    """Why the kernels can't take this weight; None where they can."""
    if w.shape[1] % 64:
        return f"its {w.shape[1]} input columns are not a multiple of 64"
    if w.shape[0] < 16:
        return f"its {w.shape[0]} output columns are fewer than 16"
    return None


def _cuda(tools: Tools) -> Call:
    normalise = rms.OPERATION.implementations[0].build(tools)
    many = WgmmaLinear(tools) if _hopper(tools) else ManyLinear(tools)
    arch, chip = tools.compiler.arch, tools.compiler.chip
    few = most_rows(arch, chip)
    spare: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def run(
        *,
        x: Tensor,
        w: Tensor,
        out: Tensor,
        rows: int,
        epilogue: Epilogue = Epilogue.STORE,
        norm: Tensor | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        eps: float = 1e-5,
        tile: Tile = PLAIN,
        overlap: bool = False,
    ) -> None:
        n, k = w.shape
        if norm is not None and rows > 16:
            # Too many rows to normalise in every block; the separate kernel sums in the same
            # order, so the bits are the same.
            key = (x.shape[0], k, x.dtype)
            if key not in spare:
                spare[key] = torch.empty_like(x)
            normalise(x=x, weight=norm, out=spare[key], rows=rows, eps=eps, overlap=overlap)
            x, norm = spare[key], None
        if rows > few or (_hopper(tools) and worth(rows, n, tools.processors)):
            many(
                x=x, w=w, out=out, rows=rows, epilogue=epilogue, bias=bias, residual=residual,
                overlap=overlap,
            )  # fmt: skip
            return
        groups, gated = row_groups(rows), epilogue == Epilogue.GATED
        units, stages = cut_for(tile, groups, arch, chip, gated=gated)
        defines = {
            "BF16": int(w.dtype == torch.bfloat16),
            "GROUPS": groups,
            "UNITS": units,
            "STAGES": stages,
            "MIN_BLOCKS": 2 if groups == 1 and units <= 5 else 1,
            "NORM": int(norm is not None),
            "EPILOGUE": int(epilogue),
        }
        shared = shared_bytes(groups, units, stages, arch)
        kernel = tools.compiler.kernel("linear", "linear", defines, threads=256, shared=shared)
        columns = n // 2 if gated else n
        grid = min((columns + 7) // 8, tools.processors * tile.blocks)
        kernel.launch((grid,), (x, w, norm, bias, residual, out, rows, n, k, eps), overlap=overlap)

    return run


def _hopper(tools: Tools) -> bool:
    # The instructions of Hopper's kernel are in no other chip, later ones included.
    return bool(tools.compiler.arch == tools.compiler.chip == 90)


def _triton(tools: Tools) -> Call:
    from outrider.kernels.linear_triton import launch_linear

    return launch_linear


_ROOM = 136


def _cases(device: torch.device, dtype: torch.dtype) -> Iterator[Arguments]:
    def random(*size: int) -> Tensor:
        return torch.randn(size, device=device).to(dtype)

    for rows, n, k, epilogue, norm, bias in (
        (1, 72, 512, Epilogue.STORE, True, True),
        (5, 64, 576, Epilogue.RESIDUAL, False, False),
        (9, 96, 512, Epilogue.GATED, True, False),
        (33, 70, 256, Epilogue.STORE_FLOAT, True, False),
        (64, 48, 1024, Epilogue.RESIDUAL, False, True),
        (70, 96, 576, Epilogue.GATED, True, True),
        (130, 72, 256, Epilogue.STORE, False, False),
    ):
        columns = n // 2 if epilogue == Epilogue.GATED else n
        kind = torch.float32 if epilogue == Epilogue.STORE_FLOAT else dtype
        yield {
            "x": random(_ROOM, k),
            "w": (torch.randn(n, k, device=device) / k**0.5).to(dtype),
            "out": torch.empty(_ROOM, columns, device=device, dtype=kind),
            "rows": rows,
            "epilogue": epilogue,
            "norm": 1 + 0.1 * random(k) if norm else None,
            "bias": random(n) if bias else None,
            "residual": random(_ROOM, columns) if epilogue == Epilogue.RESIDUAL else None,
        }


OPERATION = Operation(
    "linear",
    "linear layer with norm and activation folded in",
    reference,
    ("out",),
    _cases,
    {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3},
    (
        Implementation("cuda", no_cuda_source, _cuda),
        Implementation(
            "triton", no_triton, _triton, "no overlap of launches: about 15 % of a step's speed"
        ),
        Implementation(
            "torch", always, lambda tools: reference, "float32 products: a check, not a fast path"
        ),
    ),
)
