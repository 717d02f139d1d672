"""The plot of what ``outrider bench serve`` measured."""

from __future__ import annotations

from typing import Any

from outrider.coordinator.bench.plots import drawing
from outrider.coordinator.bench.serve.report import NAMES
from outrider.coordinator.bench.serve.traffic import Load

_SHARES = (("p50", "half within"), ("p99", "99 % within"))


def draw(figures: dict[str, Any]) -> dict[str, Any]:
    """Part of a file name -> figure."""
    levels = [level for level in figures["levels"] if level["completed"]]
    names = [str(Load(**level["load"])).replace(" ", "\n", 1) for level in levels]
    workload = figures["workload"]
    note = drawing.hardware_note(
        figures,
        f"prompt tokens: {workload['prompt_tokens'] or 'held-out code'}, "
        f"new tokens: {workload['max_new_tokens']}, "
        f"{sum(level['completed'] for level in levels)} answers",
    )
    figure, (speed, first, token) = drawing.panels(
        "Requests so many at once, or at a rate", note, 3
    )
    rates = [level["output_tokens_per_second"] for level in levels]
    drawing.grouped_bars(speed, names, [("tokens/s", rates)])
    speed.set_title("new tokens/s of all requests")
    for axis, time in ((first, "ttft"), (token, "tpot")):
        series = [
            (said, [level[time] and 1e3 * level[time][share] for level in levels])
            for share, said in _SHARES
        ]
        drawing.grouped_bars(axis, names, series)
        axis.set_title(f"{NAMES[time]}, ms")
    for axis in (speed, first, token):
        axis.tick_params(axis="x", labelsize=6.5)
    drawing.legend(figure, first)
    return {"": figure}
