"""What rounds take, kept between starts: timed once for a device, a model and these versions."""

from __future__ import annotations

import logging
import math
import platform
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from outrider.shared.core.host import cores
from outrider.shared.core.kept import alone, found
from outrider.shared.core.types import CostPoint
from outrider.shared.rounds.calibration import TrialPlan, calibrate, plan_for
from outrider.shared.rounds.session import Engine

log = logging.getLogger(__name__)

CONFIRM_SECONDS = 0.2
"""Time for looking whether kept times are right."""
DISTURBED = 1.5
"""A time that is so many times what it is now was disturbed when it was taken."""
FORMAT = 2
"""Of the table, and of how its times are taken: another one is found out anew."""


def costs_of(
    engine: Engine[Any, Any], kept: Path, progress: Callable[[str], None]
) -> list[CostPoint]:
    """What rounds of ``engine`` take: as kept in the folder, else timed now.

    Raises ``OutriderError`` as ``calibrate``; then nothing is kept.
    """
    plan = plan_for(engine)
    timed = False

    def find() -> list[tuple[int, int, float]]:
        nonlocal timed
        timed = True
        progress("calibrating")
        with alone(kept):
            began = time.perf_counter()
            points = calibrate(engine, plan)
        log.info(
            "timed rounds of %d of %d sizes in %.1f s",
            len(points), len(plan.sizes), time.perf_counter() - began,
        )  # fmt: skip
        return [astuple(point) for point in points]

    def read(kept: Any) -> list[CostPoint]:
        points = _read(kept)
        if not timed:
            _confirm(engine, plan, points)
        return points

    return found(kept, "costs", circumstances(engine) | {"sizes": plan.sizes}, find, read)


def _confirm(engine: Engine[Any, Any], plan: TrialPlan, points: list[CostPoint]) -> None:
    """Raises ``ValueError`` where rounds take much less now: something else ran when they were
    timed, and would be held against them for ever. What costs most to time is not."""
    kept = {(one.sequences, one.amount): one.seconds for one in points}
    sizes = tuple(size for size in plan.sizes if size[0] == 1 and size in kept)
    if not sizes or kept[sizes[0]] > CONFIRM_SECONDS:
        return
    for now in calibrate(engine, replace(plan, sizes=sizes), CONFIRM_SECONDS):
        seconds = kept[now.sequences, now.amount]
        if seconds > DISTURBED * now.seconds:
            raise ValueError(f"{now} took {seconds:.6f} s when it was timed")


def circumstances(engine: Engine[Any, Any]) -> dict[str, Any]:
    """All that the times of an engine depend on."""
    runner: Any = engine.runner
    facts, device = runner.facts, runner.storage.device
    return {
        "format": FORMAT,
        "outrider": metadata.version("outrider"),
        "torch": torch.__version__,
        "host": f"{_processor()}, {cores()} cores, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "engine": type(engine).__name__,
        "runner": f"{type(runner).__name__}, {facts.kernels}",
        "architecture": facts.architecture,
        "parameters": facts.parameters,
        "weight_bytes": facts.weight_bytes,
        "vocab_size": facts.vocab_size,
        "dtype": facts.dtype,
        "layers": [f"{n} of {kind}" for kind, n in Counter(runner.storage.layers).items()],
    }


def _processor() -> str:
    try:
        from outrider.kernels.cpu.compile import processor

        return processor()
    except ImportError:
        return platform.processor() or platform.machine()


def _read(kept: Any) -> list[CostPoint]:
    """Raises ``ValueError`` or ``TypeError`` where it is no table."""
    points = [CostPoint(int(count), int(amount), float(s)) for count, amount, s in kept]
    for one in points:
        if min(one.sequences, one.amount) < 1 or not 0 < one.seconds < math.inf:
            raise ValueError(f"no cost of a round: {one}")
    return points
