"""Plots of what ``outrider bench adaptive`` measured."""

from __future__ import annotations

from itertools import cycle
from typing import Any

from outrider.coordinator.bench.plots import drawing

GOAL = 0.98
"""Of the better of the base alone and the best fixed K, what the choice of K is to reach."""


def draw(figures: dict[str, Any]) -> dict[str, Any]:
    """Part of a file name -> figure."""
    points = figures["points"]
    note = drawing.hardware_note(
        figures,
        f"{figures['base']} and {figures['draft']} on {figures['device']}",
        f"{figures['max_new_tokens']} new tokens, median of {figures['repeats']} repeats",
    )
    figure, (best, alone) = drawing.panels(
        "K chosen by the coordinator, from its first token on", note, 2, head=0.62
    )
    agreements = list(dict.fromkeys(one["agreement"] for one in points))
    counts = sorted({one["sequences"] for one in points})
    colors = cycle((*drawing.SERIES, drawing.MUTED))
    for agreement, color in zip(agreements, colors, strict=False):
        own = [one for one in points if one["agreement"] == agreement]
        places = [counts.index(one["sequences"]) for one in own]
        worst = min(one["ratio"] for one in own)
        name = f"{worst:.2f} at worst" + (f", agreement {agreement}" if agreement else "")
        for axis, value, label in ((best, "ratio", name), (alone, "speedup", None)):
            values = [one[value] for one in own]
            axis.plot(places, values, "o-", color=color, label=label, markersize=3, linewidth=1.2)
    best.axhline(GOAL, color=drawing.INK, linewidth=0.8, linestyle=":")
    alone.axhline(1, color=drawing.INK, linewidth=0.8, linestyle=":")
    best.set_title(f"against the best K, 0 included (goal: {GOAL})")
    alone.set_title("against K = 0")
    for axis in (best, alone):
        axis.set_xticks(range(len(counts)), [str(count) for count in counts])
        axis.set_xlabel("sequences")
        axis.set_ylim(0, None)
    best.legend(loc="lower left", fontsize=7, handlelength=1.2)
    return {"": figure}
