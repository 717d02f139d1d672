"""Plots of what ``outrider bench links`` measured."""

from __future__ import annotations

from typing import Any

from outrider.coordinator.bench.plots import drawing

PARTS = ("draft", "verify", "overhead")


def draw(figures: dict[str, Any]) -> dict[str, Any]:
    """Part of a file name -> figure."""
    return {"rounds": _rounds(figures), "bare": _bare(figures)}


def _note(figures: dict[str, Any], *more: str) -> str:
    return drawing.hardware_note(figures, f"on {figures['device']}", *more)


def _rounds(figures: dict[str, Any]) -> Any:
    """What a round's time goes to, over each link, for each K."""
    variants = sorted(figures["variants"], key=lambda v: v["k"])
    figure, (axis,) = drawing.panels(
        "A round over each link, ms",
        _note(
            figures,
            f"prompts: {figures['prompts']}, new tokens: {figures['max_new_tokens']}, "
            f"median of {figures['repeats']} repeats",
        ),
        1,
        height=1.3 + 0.22 * len(variants),
        left=0.19,
        head=0.62,
    )
    places = range(len(variants))
    begin = [0.0] * len(variants)
    for color, part in zip(drawing.SERIES, PARTS, strict=False):
        values = [v["round_ms"][part] for v in variants]
        axis.barh(places, values, 0.7, begin, color=color, label=part)
        begin = [low + value for low, value in zip(begin, values, strict=True)]
    for y, (end, v) in enumerate(zip(begin, variants, strict=True)):
        axis.annotate(
            f"{drawing.short(end)} ms, {v['tokens_per_second']:,.0f} tokens/s",
            (end, y), xytext=(4, 0), textcoords="offset points", va="center", size=6.5,
        )  # fmt: skip
    axis.set_yticks(places, [f"{v['link']}, K = {v['k']}" for v in variants])
    axis.invert_yaxis()
    axis.set_xlim(0, max(begin) * 1.3)
    axis.grid(visible=False, axis="y")
    axis.tick_params(axis="y", length=0)
    axis.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncol=3, fontsize=7, handlelength=1.2)
    return figure


def _bare(figures: dict[str, Any]) -> Any:
    """The links by themselves."""
    bare = figures["bare"]
    figure, (axis,) = drawing.panels(
        "A round of the link alone, no model in between, µs",
        _note(figures, "median of each"),
        1,
        height=1.15 + 0.3 * len(bare),
        left=0.24,
        head=0.45,
    )
    micros = [1e6 * one["median"] for one in bare]
    labels = [f"{1e6 * one['median']:,.0f}, p99 {1e6 * one['p99']:,.0f}" for one in bare]
    drawing.labelled_bars(axis, [one["link"] for one in bare], micros, labels, drawing.SERIES[0])
    axis.set_xlim(0, max(micros) * 1.3)
    return figure
