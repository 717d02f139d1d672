"""The picture of ``outrider bench timeline``."""

from __future__ import annotations

from typing import Any

from outrider.coordinator.bench.plots import drawing
from outrider.coordinator.bench.studies import timeline

_LANES = {"draft": ("draft", drawing.SERIES[0]), "verify": ("base", drawing.SERIES[1])}


def draw(figures: dict[str, Any]) -> dict[str, Any]:
    """Part of a file name -> figure."""
    shown = figures["timelines"]
    figure, axes = drawing.panels(
        f"Who works when, K = {figures['k']}",
        drawing.hardware_note(
            figures,
            f"on {figures['device']}, {'with' if figures['cuda_mps'] else 'without'} CUDA MPS",
        ),
        1,
        height=1.1 + 0.75 * len(shown),
        left=0.11,
        head=0.42,
    )
    (axis,) = axes
    lanes: list[str] = []
    end = max(turn["end"] for one in shown for turn in one["turns"])
    for one in shown:
        parts = timeline.shares(one["turns"])
        for service, (name, color) in _LANES.items():
            bars = [
                (turn["begin"], turn["end"] - turn["begin"])
                for turn in one["turns"]
                if turn["service"] == service
            ]
            axis.broken_barh(bars, (len(lanes) - 0.35, 0.7), color=color)
            note = f"{parts[service]:.0%}"
            if service == "verify":
                note += f", neither {parts['neither']:.0%}"
            axis.annotate(
                note, (max(turn["end"] for turn in one["turns"]), len(lanes)), xytext=(4, 0),
                textcoords="offset points", va="center", size=6.5,
            )  # fmt: skip
            lanes.append(f"{one['link']}: {name}")
    axis.set_yticks(range(len(lanes)), lanes)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(lanes) - 0.4, -0.6)
    axis.set_xlim(0, end * 1.14)
    axis.set_xlabel("ms", size=7)
    axis.grid(visible=False, axis="y")
    return {"": figure}
