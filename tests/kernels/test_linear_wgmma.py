"""Which kernel and tile a linear layer takes on Hopper, against the times that were measured."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

from outrider.kernels.linear_shapes import FEW_ROWS
from outrider.kernels.linear_wgmma import best_tile, worth

DATA = Path(__file__).parents[2] / "docs" / "results" / "data" / "gpu-linear-rows-h100.csv"
PROCESSORS = 132


def measured() -> dict[tuple[int, int, int], dict[str, float]]:
    """Microseconds by kernel, of every (columns, k, rows)."""
    found: dict[tuple[int, int, int], dict[str, float]] = defaultdict(dict)
    with DATA.open() as lines:
        for line in csv.DictReader(lines):
            shape = int(line["columns"]), int(line["k"]), int(line["rows"])
            if line["kernel"] != "cuBLAS":
                found[shape][line["kernel"]] = float(line["microseconds"])
    return found


def chosen(rows: int, columns: int) -> str:
    if rows <= FEW_ROWS and not worth(rows, columns, PROCESSORS):
        return "linear.cu"
    tile = best_tile(rows, columns, PROCESSORS)
    return f"linear_wgmma.cu {tile.consumers} consumers {tile.stages} stages split {tile.split}"


def test_linear_layers_take_nearly_the_fastest_kernel_that_was_measured():
    lost = []
    for (columns, k, rows), times in measured().items():
        ratio = times[chosen(rows, columns)] / min(times.values())
        assert ratio < 1.26, (columns, k, rows, times)
        lost.append(ratio)
    assert sum(lost) / len(lost) < 1.03
