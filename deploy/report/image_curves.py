"""The sensors of a run as its files tell them: image statistics and watch rewards beside the base model's band, and the alerts."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from common.sensors import WATCHED, WINDOW, Alert, Band, Reading, Reference, judge, make_bands, smoothed
from deploy.report.drawing import INK, MUTED, Panel, as_array, color, make_grid, to_uri
from deploy.report.records import EvaluationRecord, RunHistory, UpdateRecord
from deploy.report.samples import ImageShelf, base_statistics

COLUMNS = 4
ALERT = "#dc2626"


@dataclass(frozen=True, slots=True, kw_only=True)
class SensorRecord:
    """What the sensors saw over a run."""

    readings: tuple[Reading, ...]
    bands: Mapping[str, Band]
    alerts: tuple[Alert, ...]

    @property
    def names(self) -> list[str]:
        """Every sensor that was measured: statistics, then watch rewards that have a band."""
        measured = {name for reading in self.readings for name in reading.statistics}
        return [*sorted(measured), *(name for name in self.bands if name.startswith(WATCHED))]


def read_sensors(history: RunHistory, shelf: ImageShelf) -> SensorRecord:
    """Judge a run again from its files, by the rules of common.sensors. Raises CorruptFile."""
    readings = tuple(_reading(record) for record in history.updates)
    train, watch = _uses(history)
    bands = make_bands(_reference(history.base, shelf, watch), readings, watch)
    return SensorRecord(readings=readings, bands=bands, alerts=tuple(judge(readings, bands, train)))


def _reading(record: UpdateRecord) -> Reading:
    means = {name: summary.mean for name, summary in record.rewards.items() if summary.mean is not None}
    groups = sum(record.staleness.values())
    return Reading(update=record.update, num_groups=groups, rewards=means, statistics=record.image_statistics)


def _uses(history: RunHistory) -> tuple[list[str], list[str]]:
    """Names of train and of watch rewards; without a configuration on file every reward trains."""
    configured = history.config.get("reward") or [{"name": name} for record in history.updates[:1] for name in record.rewards]
    uses = {str(reward["name"]): str(reward.get("use", "train")) for reward in configured}
    return [name for name, use in uses.items() if use == "train"], [name for name, use in uses.items() if use == "watch"]


def _reference(base: EvaluationRecord | None, shelf: ImageShelf, watch: list[str]) -> Reference | None:
    if base is None:
        return None
    values = base_statistics(shelf, base)
    for name in watch:
        values[WATCHED + name] = [score for row in base.rows if (score := row.scores.get(name)) is not None]
    num_prompts = len({row.prompt_id for row in base.rows})
    return Reference(num_prompts=num_prompts, values={name: np.array(found, dtype=np.float32) for name, found in values.items()})


def draw_sensors(sensors: SensorRecord) -> Panel | None:
    """Small multiples, one a sensor; None when no update has any."""
    names = sensors.names
    if not names:
        return None
    rows = -(-len(names) // COLUMNS)
    figure, flat = make_grid(COLUMNS, rows, 13.8, 2.2 * rows)
    for position, (axes, name) in enumerate(zip(flat, names, strict=False)):
        _draw_sensor(axes, sensors, name, color(position))
    for axes in flat[len(names) :]:
        axes.set_visible(False)
    caption = f"Thin: mean over each update's training images; thick: mean of {WINDOW} updates"
    caption += "; gray: the band of the base model's evaluation images" if sensors.bands else ""
    caption += "; red: outside it while a train reward was above its start." if sensors.alerts else "."
    return Panel(title="Image statistics", caption=caption, uri=to_uri(figure), is_wide=True)


def _draw_sensor(axes: Axes, sensors: SensorRecord, name: str, tone: str) -> None:
    numbers = [reading.update for reading in sensors.readings]
    alerts = [alert for alert in sensors.alerts if alert.sensor == name]
    tone = ALERT if alerts else tone
    axes.plot(numbers, as_array([reading.value(name) for reading in sensors.readings]), color=tone, linewidth=0.9, alpha=0.35)
    axes.plot(numbers, as_array(smoothed(sensors.readings, name)), color=tone, linewidth=1.7)
    band = sensors.bands.get(name)
    if band is not None:
        top = band.high if math.isfinite(band.high) else max(axes.get_ylim()[1], band.low)
        axes.axhspan(band.low, top, color=MUTED, alpha=0.13, linewidth=0)
    for alert in alerts:
        axes.axvline(alert.update, color=ALERT, linewidth=1.0, linestyle=(0, (3, 2)))
        axes.plot([alert.update], [alert.value], color=ALERT, marker="o", markersize=5)
    title = name.removeprefix(WATCHED) + " (watched)" if name.startswith(WATCHED) else name.replace("_", " ")
    axes.set_title(title, fontsize=9, loc="left", color=ALERT if alerts else INK)


def numbers_of(sensors: SensorRecord) -> dict[str, Any]:
    """Bands and alerts as JSON has them: an end that does not exist is null."""
    bands = {name: asdict(band) | {"high": band.high if math.isfinite(band.high) else None} for name, band in sensors.bands.items()}
    return {"bands": bands, "alerts": [asdict(alert) for alert in sensors.alerts]}
