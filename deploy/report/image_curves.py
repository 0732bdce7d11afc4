"""Image statistics of the training samples beside the base model's spread: the sensors of reward hacking."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from deploy.report.curves import Panel
from deploy.report.drawing import MUTED, color, make_grid, smooth, to_uri
from deploy.report.records import RunHistory

COLUMNS = 4
LAST_UPDATES = 5
_WITHIN_GROUP = "diversity"  # of a group's samples; an evaluation sheet mixes prompts, so the base gives no band


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """The base model's spread of one statistic over its evaluation images: mean ± 2 standard deviations."""

    low: float
    high: float


def base_bands(statistics: Mapping[str, list[float]]) -> dict[str, Band]:
    """Return the band of each statistic of the base's evaluation images; too few images give none."""
    bands = {}
    for name, values in statistics.items():
        if len(values) >= 2 and name != _WITHIN_GROUP:
            mean, spread = float(np.mean(values)), float(np.std(values))
            floor = 0.0 if min(values) >= 0 else -np.inf  # a share or a variance cannot be negative
            bands[name] = Band(low=max(mean - 2 * spread, floor), high=mean + 2 * spread)
    return bands


def image_statistics(history: RunHistory, bands: Mapping[str, Band]) -> Panel | None:
    """Small multiples, one a statistic; None when no update has any."""
    names = sorted({name for record in history.updates for name in record.image_statistics})
    if not names:
        return None
    rows = -(-len(names) // COLUMNS)
    figure, flat = make_grid(COLUMNS, rows, 13.8, 2.2 * rows)
    numbers = [record.update for record in history.updates]
    for position, (axes, name) in enumerate(zip(flat, names, strict=False)):
        values = [record.image_statistics.get(name) for record in history.updates]
        if name in bands:
            axes.axhspan(bands[name].low, bands[name].high, color=MUTED, alpha=0.13, linewidth=0)
        axes.plot(numbers, smooth(values), color=color(position), linewidth=1.6)
        axes.set_title(name.replace("_", " "), fontsize=9, loc="left")
    for axes in flat[len(names) :]:
        axes.set_visible(False)
    caption = "Mean over each update's training images"
    caption += "; gray: mean ± 2 standard deviations of the base model's evaluation images." if bands else "."
    return Panel(title="Image statistics", caption=caption, uri=to_uri(figure), is_wide=True)


def outside_bands(history: RunHistory, bands: Mapping[str, Band]) -> list[str]:
    """Return the statistics whose mean over the last updates lies outside the base's band."""
    found = []
    for name, band in sorted(bands.items()):
        values = [record.image_statistics[name] for record in history.updates[-LAST_UPDATES:] if name in record.image_statistics]
        if values and not band.low <= float(np.mean(values)) <= band.high:
            found.append(name)
    return found
