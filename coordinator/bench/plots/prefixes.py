"""The picture of ``outrider bench prefixes``."""

from __future__ import annotations

from typing import Any

from outrider.coordinator.bench.plots import drawing
from outrider.coordinator.bench.prefixes import VARIANTS


def draw(figures: dict[str, Any]) -> dict[str, Any]:
    """Part of a file name -> figure."""
    turns = figures["turns"]
    figure, (axis,) = drawing.panels(
        f"First token of a second turn behind {figures['history']:,} tokens, ms",
        drawing.hardware_note(
            figures, f"on {figures['device']}", f"median of {figures['repeats']} repeats"
        ),
        1,
    )
    series = [
        (name, [1e3 * one["first_token_seconds"][name] for one in turns]) for name in VARIANTS
    ]
    groups = [f"{one['new']} new\n{one['against_alone']:.2f}× alone" for one in turns]
    drawing.grouped_bars(axis, groups, series, floor=1.0)
    drawing.legend(figure, axis)
    return {"": figure}
