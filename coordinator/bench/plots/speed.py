"""Plots of what ``outrider bench step`` and the plain ``outrider bench`` measured."""

from __future__ import annotations

from typing import Any

from outrider.coordinator.bench.plots import drawing


def draw_step(figures: dict[str, Any]) -> dict[str, Any]:
    """Part of a file name -> figure, of the steps of one model process."""
    model = figures["model"]
    name = f"{model['name'].removeprefix('planted:')}, {model['runner']} runner"
    found = {"share": _share(figures, name)}
    if figures.get("parts"):
        found["operations"] = _operations(figures, name)
    return found


def draw_bench(figures: dict[str, Any]) -> dict[str, Any]:
    """Part of a file name -> figure, of speculation at each K."""
    return {"": _bench(figures)}


def _note(figures: dict[str, Any]) -> str:
    ceiling = f"ceiling: weights read once a step at {figures['copy_bandwidth'] / 1e12:.3g} TB/s"
    return drawing.hardware_note(figures, figures["device"], figures["model"]["dtype"], ceiling)


def _share(figures: dict[str, Any], name: str) -> Any:
    entries = figures["figures"]
    figure, (axis,) = drawing.panels(
        f"Share of the memory's ceiling: {name}",
        _note(figures),
        1,
        height=1.05 + 0.24 * len(entries),
        left=0.21,
        head=0.43,
    )
    drawing.labelled_bars(
        axis,
        [_round(entry) for entry in entries],
        [entry["share"] * 100 for entry in entries],
        [
            f"{entry['share']:.0%}: {entry['seconds'] * 1e3:.3f} ms, {entry['rate']:,.0f} tokens/s"
            for entry in entries
        ],
        drawing.SERIES[0],
    )
    axis.set_xlim(0, 100)
    axis.set_xlabel("% of the ceiling")
    return figure


def _round(entry: dict[str, Any]) -> str:
    if entry["kind"] == "draft loop":
        return f"draft loop, K = {entry['rows']}"
    count = f"{entry['sequences']} sequence{'s' if entry['sequences'] > 1 else ''}"
    rows = "" if entry["rows"] == 1 else f" of {entry['rows']} rows"
    return f"{entry['kind']}, {count}{rows}"


def _operations(figures: dict[str, Any], name: str) -> Any:
    parts = [part for part in figures["parts"] if part.get("sequences", 1) == 1]
    figure, axes = drawing.panels(
        f"Operations of one step, one row: {name}",
        _note(figures),
        3,
        height=1.2 + 0.24 * len(parts),
        left=0.24,
        head=0.62,
    )
    bandwidth = figures["copy_bandwidth"]
    names = [f"{part['name']} ({part['launches']}×)" for part in parts]
    shares = [part["weight_bytes"] / part["seconds"] / bandwidth * 100 for part in parts]
    megabytes = [part["weight_bytes"] / 1e6 for part in parts]
    micros = [part["seconds"] * 1e6 for part in parts]
    columns = (
        ("weights read, MB", megabytes, [f"{value:,.1f}" for value in megabytes]),
        ("time, µs", micros, [f"{value:,.1f}" for value in micros]),
        ("of copy bandwidth, %", shares, [f"{v:.0f}%" if v else "no weights" for v in shares]),
    )
    for color, axis, (title, values, labels) in zip(drawing.SERIES, axes, columns, strict=False):
        drawing.labelled_bars(axis, names, values, labels, color)
        axis.set_title(title)
        if axis is not axes[0]:
            axis.set_yticklabels([])
    axes[2].set_xlim(0, 125)
    axes[2].set_xticks(range(0, 101, 25))
    return figure


def _bench(figures: dict[str, Any]) -> Any:
    variants = figures["variants"]
    names = ["auto" if v["k"] is None else str(v["k"]) for v in variants]
    workload, base = figures["workload"], figures["base"]
    note = drawing.hardware_note(
        figures,
        f"{base['dtype']} on {base['device']}",
        f"{workload['max_new_tokens']} new tokens, temperature {workload['temperature']:g}, "
        f"{workload['concurrency']} at once, median of {workload['repeats']} repeats",
    )
    figure, (speed, rounds) = drawing.panels(
        "Speculation at each K, through the public API", note, 2
    )
    rates = [v["tokens_per_second"] for v in variants]
    places = range(len(variants))
    speed.bar(places, rates, 0.7, color=drawing.SERIES[0], label="tokens/s")
    spread = [(x, rate) for x, v in enumerate(variants) for rate in v["tokens_per_second_runs"]]
    speed.plot(*zip(*spread, strict=True), "o", color=drawing.INK, markersize=2, label="each run")
    highest = max(rate for _, rate in spread)
    for x, v in zip(places, variants, strict=True):
        text = f"{v['tokens_per_second']:,.0f}"
        if v.get("speedup") is not None and v["k"] != 0:
            text += f"\n{v['speedup']:.2f}×"
        y = max(v["tokens_per_second_runs"])
        speed.annotate(
            text, (x, y), xytext=(0, 4), textcoords="offset points", ha="center", size=6.5
        )
    speed.set_ylim(0, highest * 1.25)
    speed.set_title("tokens/s, and against the base alone", y=1.1)
    below = [0.0] * len(variants)
    for color, part in zip(drawing.SERIES, ("draft", "verify", "overhead"), strict=False):
        values = [v["round_ms"][part] for v in variants]
        rounds.bar(places, values, 0.7, below, color=color, label=part)
        below = [low + value for low, value in zip(below, values, strict=True)]
    for x, total in zip(places, below, strict=True):
        rounds.annotate(
            drawing.short(total), (x, total), xytext=(0, 3), textcoords="offset points",
            ha="center", size=6.5,
        )  # fmt: skip
    rounds.set_ylim(0, max(below) * 1.15)
    rounds.set_title("mean round, ms", y=1.1)
    for axis in (speed, rounds):
        axis.set_xticks(places, names)
        axis.set_xlabel("K")
        axis.tick_params(axis="x", length=0)
        axis.grid(visible=False, axis="x")
        axis.legend(
            loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncol=3, fontsize=7, handlelength=1.2
        )
    return figure
