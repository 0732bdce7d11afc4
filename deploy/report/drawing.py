"""The look of the report's figures: one palette, quiet axes, SVG as data URIs."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

INK, MUTED, GRID = "#1e2330", "#667085", "#eceef2"
PALETTE = ("#4f46e5", "#0d9488", "#d97706", "#db2777", "#0284c7", "#65a30d", "#7c3aed", "#b45309")
LIGHT_TO_DARK = ("#c7d2fe", "#818cf8", "#4f46e5", "#312e81", "#1e1b4b")  # staleness 0, 1, 2 ...
ROLES = {"wait": "#f59e0b", "read": "#38bdf8", "learn": "#4f46e5", "save": "#94a3b8"}
STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": 9.0, "text.color": INK, "axes.edgecolor": "#cfd4dc", "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5, "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.grid": True, "axes.grid.axis": "y",
    "grid.color": GRID, "grid.linewidth": 1.0, "axes.axisbelow": True, "xtick.major.size": 3, "ytick.major.size": 0,
    "lines.linewidth": 1.8, "lines.solid_capstyle": "round", "legend.frameon": False, "legend.fontsize": 8.0,
    "svg.hashsalt": "flowfleet", "svg.fonttype": "path", "figure.dpi": 100,
}  # fmt: skip
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One drawn figure."""

    title: str
    caption: str
    uri: str  # data:image/svg+xml
    is_wide: bool = False


def color(position: int) -> str:
    """The palette's color of the n-th series."""
    return PALETTE[position % len(PALETTE)]


def make_axes(width: float = 4.5, height: float = 2.75) -> tuple[Figure, Axes]:
    """One set of axes over integer updates."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        tidy(axes)
    return figure, axes


def make_grid(columns: int, rows: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Small multiples, row by row."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        found = figure.subplots(rows, columns, squeeze=False)
        flat = [axes for line in found for axes in line]
        for axes in flat:
            tidy(axes)
    return figure, flat


def tidy(axes: Axes) -> None:
    """Few ticks, whole updates."""
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.get_offset_text().set_horizontalalignment("right")  # beside the legend, not under it
    axes.margins(x=0.02)


def legend(axes: Axes, columns: int = 3) -> None:
    """A legend above the axes, left, so that it hides no data."""
    if axes.get_legend_handles_labels()[1]:
        with matplotlib.rc_context(STYLE):
            axes.legend(
                loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns, borderaxespad=0.1, handlelength=1.2, columnspacing=1.2,
                handletextpad=0.5,
            )  # fmt: skip


def to_uri(figure: Figure) -> str:
    """Return the figure as an SVG data URI."""
    sink = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(sink.getvalue()).decode()


def as_array(values: Sequence[float | None]) -> Array:
    """Nulls as gaps of a line."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def smooth(values: Sequence[float | None]) -> Array:
    """Centered moving mean over about a tenth of the points, nulls left out, shorter at both ends; under 20 points nothing is smoothed."""
    array = as_array(values)
    half = len(array) // 20
    windows = [array[max(i - half, 0) : i + half + 1] for i in range(len(array))]
    return np.array([np.nan if np.isnan(window).all() else np.nanmean(window) for window in windows])


def marker(count: int) -> str | None:
    """Points are marked while they are few."""
    return "o" if count <= 25 else None
