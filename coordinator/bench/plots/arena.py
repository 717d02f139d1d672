"""Plots of what ``outrider bench arena`` measured."""

from __future__ import annotations

from typing import Any

from outrider.coordinator.bench.plots import drawing


def draw(figures: dict[str, Any]) -> dict[str, Any]:
    """Part of a file name -> figure."""
    found = {"bookkeeping": _bookkeeping(figures)}
    if figures.get("appending"):
        found["append"] = _by_length(
            figures, "append", 1e6, 10.0, "Appending one token a sequence, all layers: µs"
        )
        found["memory"] = _by_length(
            figures, "memory", 2**-20, 0.01, "Memory a step needs beyond weights and KV held: MiB"
        )
    return found


def _bookkeeping(figures: dict[str, Any]) -> Any:
    figure, (rollback, admission, use) = drawing.panels(
        "The arena's bookkeeping", drawing.hardware_note(figures), 3
    )
    _lines(
        rollback,
        [r["rejected"] for r in figures["rollback"]],
        [("rollback", [r["seconds"] * 1e6 for r in figures["rollback"]])],
    )
    rollback.set_title("Rollback, µs", y=1.12)
    rollback.set_xlabel("rejected tokens")
    rollback.axhline(1.0, color=drawing.MUTED, linewidth=0.8, linestyle="--", label="goal: 1 µs")
    live = [r["live"] for r in figures["admission"]]
    _lines(
        admission,
        live,
        [
            (name, [r[name] * 1e6 for r in figures["admission"]], above)
            for name, above in (("admit", True), ("free", False))
        ],
    )
    admission.set_title("Admit and free, µs", y=1.12)
    admission.set_xlabel("live extents")
    drawing.grouped_bars(
        use,
        [r["sizes"] for r in figures["fragmentation"]],
        [
            (name, [r[key] * 100 for r in figures["fragmentation"]])
            for name, key in (("arena", "used"), ("ideal packer", "ideal"))
        ],
    )
    use.set_title("Slots in use when full, %", y=1.12)
    use.set_xlabel("sizes of the requests")
    for axis in (rollback, admission, use):
        axis.legend(
            loc="lower left", bbox_to_anchor=(-0.03, 0.98), ncol=2, fontsize=7, handlelength=1.2
        )
    return figure


def _lines(axis: Any, places: list[int], series: list[Any]) -> None:
    """Lines over a logarithmic x, each point with its number, above its line or below."""
    top = 0.0
    for color, (name, values, *above) in zip(drawing.SERIES, series, strict=False):
        axis.plot(places, values, "o-", markersize=3, linewidth=1.2, label=name, color=color)
        top = max(top, *values)
        up = not above or above[0]
        for x, y in zip(places, values, strict=True):
            axis.annotate(
                drawing.short(y), (x, y), xytext=(0, 5 if up else -5),
                textcoords="offset points", ha="center", va="bottom" if up else "top", size=6,
            )  # fmt: skip
    axis.set_xscale("log")
    axis.set_xticks(places, [f"{n // 1024}k" if n % 1024 == 0 else f"{n:,}" for n in places])
    axis.minorticks_off()
    axis.margins(x=0.08)
    axis.set_ylim(0, max(top * 1.3, 1.2))


def _by_length(figures: dict[str, Any], key: str, scale: float, floor: float, title: str) -> Any:
    entries = figures["appending"]
    batches = sorted({r["batch"] for r in entries})
    lengths = sorted({r["length"] for r in entries})
    caches = list(dict.fromkeys(r["cache"] for r in entries))
    found = {(r["cache"], r["batch"], r["length"]): r[key] for r in entries}
    model = figures["model"]
    kind = f"{model['layers']} layers, hidden {model['hidden']}, {model['dtype'].split('.')[-1]}"
    note = drawing.hardware_note(figures, f"Llama of {kind} on {model['device']}")
    figure, axes = drawing.panels(title, note, len(batches), sharey=True)
    for axis, batch in zip(axes, batches, strict=True):
        values = [
            (cache, [_scaled(found.get((cache, batch, length)), scale) for length in lengths])
            for cache in caches
        ]
        drawing.grouped_bars(axis, [f"{n:,}" for n in lengths], values, floor=floor)
        axis.set_title(f"{batch} sequence{'s' if batch > 1 else ''}")
        axis.set_xlabel("tokens cached")
    # The panels share one scale, which the last one to be drawn has set for itself.
    highest = max((_scaled(r[key], scale) or floor) for r in entries)
    axes[0].set_ylim(floor, (max(highest, 10 * floor) / floor) ** 1.3 * floor)
    drawing.legend(figure, axes[0])
    return figure


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale
