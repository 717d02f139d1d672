"""How plots look, and how they become SVG: the same bytes from the same figures.

Text stays text, so that a plot can be searched and stays small. Each picture brings its own
background, and a second set of colours for readers whose screen is set to dark.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from outrider.shared.core.errors import ConfigError

INK, MUTED, GRID, PAPER = "#24292f", "#6e7781", "#d0d7de", "#ffffff"
# Legible on both backgrounds.
SERIES = ("#2f7ed8", "#1a9e6c", "#d9730d", "#a259c4")
_DARK = {INK: "#e6edf3", MUTED: "#9198a1", GRID: "#30363d", PAPER: "#0d1117"}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "outrider",
    # matplotlib brings the first; readers without it get a font of that kind.
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}


def _library(module: str) -> Any:
    """A module of matplotlib. Raises ``ConfigError`` where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            "plots need matplotlib, which is not installed: pip install 'outrider[plots]'"
        ) from error


@contextmanager
def styled() -> Iterator[None]:
    """Figures made and saved inside look as this module says, whatever the user's settings."""
    matplotlib = _library("matplotlib")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def panels(
    title: str,
    note: str,
    count: int,
    *,
    height: float = 3.4,
    left: float = 0.075,
    head: float = 0.86,
    **options: Any,
) -> tuple[Any, Sequence[Any]]:
    """A figure with panels side by side, a title and a line of small print.

    ``height`` and ``head``, the room above the panels, are in inches; ``left`` is a share.
    """
    figure = _library("matplotlib.figure").Figure(figsize=(9.2, height))
    axes = figure.subplots(1, count, squeeze=False, **options)[0]
    # Margins are given, not fitted: fitting depends on how wide text comes out.
    figure.subplots_adjust(
        left=left, right=0.975, bottom=0.62 / height, top=1 - head / height, wspace=0.22
    )
    figure.text(0.012, 1 - 0.2 / height, title, size=10, weight="bold", va="center")
    figure.text(0.012, 0.12 / height, note, size=6.5, color=MUTED, va="center")
    return figure, axes


def legend(figure: Any, axis: Any, *, height: float = 3.4) -> None:
    """The names of an axis's series, in one line under the title."""
    handles, names = axis.get_legend_handles_labels()
    figure.legend(
        handles, names, loc="center left", bbox_to_anchor=(0.004, 1 - 0.42 / height),
        ncol=len(names), fontsize=8, handlelength=1.2, columnspacing=1.4,
    )  # fmt: skip


def grouped_bars(
    axis: Any,
    groups: Sequence[str],
    series: Sequence[tuple[str, Sequence[float | None]]],
    *,
    floor: float | None = None,
) -> None:
    """Bars side by side in each group, each with its number. With ``floor`` the scale is
    logarithmic and begins there; a bar below it keeps its number and has no length."""
    width = 0.84 / len(series)
    top = 0.0
    for place, (name, values) in enumerate(series):
        offsets = [i + (place - (len(series) - 1) / 2) * width for i in range(len(groups))]
        heights = [max(value or 0.0, floor or 0.0) for value in values]
        axis.bar(offsets, heights, width * 0.92, label=name, color=SERIES[place])
        top = max(top, *heights)
        for x, y, value in zip(offsets, heights, values, strict=True):
            axis.annotate(
                "-" if value is None else short(value), (x, y), xytext=(0, 3),
                textcoords="offset points", rotation=90, rotation_mode="anchor", va="center",
                size=6,
            )  # fmt: skip
    axis.set_xticks(range(len(groups)), groups)
    axis.tick_params(axis="x", length=0)
    axis.grid(visible=False, axis="x")
    if floor is None:
        axis.set_ylim(0, top * 1.25)
    else:
        axis.set_yscale("log")
        axis.set_ylim(floor, (top / floor) ** 1.3 * floor)


def labelled_bars(
    axis: Any, names: Sequence[str], values: Sequence[float], labels: Sequence[str], color: str
) -> None:
    """Horizontal bars, the first on top, each with its label behind it."""
    places = range(len(names))
    axis.barh(places, values, 0.7, color=color)
    for place, value, label in zip(places, values, labels, strict=True):
        axis.annotate(
            label, (value, place), xytext=(3, 0), textcoords="offset points", va="center", size=7
        )
    axis.set_yticks(places, names)
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False, axis="y")
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlim(0, max(*values, 1e-9) * 1.3)


def short(value: float) -> str:
    """About three digits: 0, 0.013, 0.74, 12.3, 4,879."""
    if value == 0:
        return "0"
    if abs(value) < 0.1:
        return f"{value:.2g}"
    return f"{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"


def hardware_note(figures: dict[str, Any], *more: str) -> str:
    """The small print: what ran where."""
    hardware = figures.get("hardware", {})
    versions = hardware.get("versions", {})
    parts = [*more, *hardware.get("accelerators", [])]
    parts += [hardware.get("processor", ""), f"{hardware.get('cores', '?')} cores"]
    parts += [f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions]
    return ", ".join(part for part in parts if part)


def svg(figure: Any) -> str:
    """The figure as SVG that needs nothing from elsewhere."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # no reference to a document type on the web
    dark = "".join(
        f'[style*="{part}: {light}"]{{{part}:{dark}!important}}'
        for light, dark in _DARK.items()
        for part in ("fill", "stroke")
    )
    begin = text.index("<defs>")
    style = f"<style>@media (prefers-color-scheme: dark){{{dark}}}</style>\n "
    lines = (text[:begin] + style + text[begin:]).splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"
