"""Sensors of reward hacking: what a run's images are like, held against the base model's; pure, no I/O.

A sensor is an image statistic, or a watch reward (named reward.<name>). Every update gives one reading of it, a mean over the update's
images. The base model's evaluation images give its band. An alert says that a sensor left its band while a train reward rose.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common.types import FloatArray

WINDOW = 5  # updates that a smoothed value averages: an update's own images are few, and their prompts differ
START = 3  # the first updates, whose mean is the start
PERSISTENCE = 3  # smoothed values in a row outside the band, with a risen reward, that make an alert
STANDARD_ERRORS = 4.0
LEAST_SPREADS = 0.5  # of the images' standard deviation: by less than this any honest training moves a mean
LEAST_DIVERSITY = 2 / 3  # of its start: within-group diversity has no reference, since an evaluation mixes prompts
DIVERSITY = "diversity"
WATCHED = "reward."  # prefix of a watch reward among the sensors
LEAST_MOVES = {
    "brightness_mean": 0.02, "dark_share": 0.02, "saturated_share": 0.02, "color_entropy": 0.1, "laplacian_variance": 20.0,
    "edge_density": 0.01, "fft_grid_peak": 0.5,
}  # fmt: skip
"""In a statistic's own units: smaller moves are not seen, and a base whose images are all alike has no spread to go by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One update's means; what was not measured is absent."""

    update: int
    num_groups: int  # prompts that the means are over
    rewards: Mapping[str, float]  # raw, trained or watched
    statistics: Mapping[str, float]

    def value(self, sensor: str) -> float | None:
        """A sensor's mean, None where it was not measured."""
        return self.rewards.get(sensor.removeprefix(WATCHED)) if sensor.startswith(WATCHED) else self.statistics.get(sensor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The base model on the fixed prompts and seeds."""

    num_prompts: int
    values: Mapping[str, FloatArray]  # sensor -> one value an image


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Where a sensor's smoothed values lie while nothing is wrong."""

    sensor: str
    low: float
    center: float
    high: float  # inf for a sensor that can only fall too far

    def holds(self, value: float) -> bool:
        """Whether a value lies inside."""
        return self.low <= value <= self.high

    def position(self, value: float) -> float:
        """0 in the center, -1 and +1 at the ends; beyond them outside."""
        width = self.high - self.center if math.isfinite(self.high) else self.center - self.low
        return (value - self.center) / width if width > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """A sensor left its band while a train reward rose."""

    sensor: str
    update: int  # the last of the PERSISTENCE updates
    value: float  # smoothed, at that update
    sentence: str


def make_bands(reference: Reference | None, readings: Sequence[Reading], watch: Collection[str]) -> dict[str, Band]:
    """Return the band of every sensor; none before the START-th update.

    The mean of m = WINDOW x P groups is compared with the mean of the reference's N prompts, so its half-width is
    h = 4 sd sqrt(1/m + 1/N) + max(sd / 2, least move), with sd the standard deviation over the reference's images. Images of one
    prompt are counted once (m and N count prompts), which can only widen a band. The band reaches from min(base, start) - h to
    max(base, start) + h: at the start the base itself is trained on, with the training prompts and sampler, and how those differ from
    the evaluation's is no hack. A watch reward has no upper end. Diversity has the lower end 2/3 of its start.

    Args:
        reference: the base's evaluation; None: only diversity has a band.
        readings: by update, the run's first ones among them.
        watch: names of watch rewards.
    """
    if len(readings) < START:
        return {}
    bands = {}
    for sensor, values in (reference.values if reference else {}).items():
        begun = _mean(readings[:START], sensor)
        is_watched = sensor.startswith(WATCHED)
        if sensor == DIVERSITY or begun is None or len(values) < 2 or (is_watched and sensor.removeprefix(WATCHED) not in watch):
            continue
        bands[sensor] = _band(sensor, values, begun, _relative_error(reference, readings[0]), is_open=is_watched)
    begun = _mean(readings[:START], DIVERSITY)
    if begun is not None:
        bands[DIVERSITY] = Band(sensor=DIVERSITY, low=LEAST_DIVERSITY * begun, center=begun, high=math.inf)
    return dict(sorted(bands.items()))


def _relative_error(reference: Reference | None, reading: Reading) -> float:
    """Sqrt(1/m + 1/N): of the difference of both means, in standard deviations."""
    num_prompts = reference.num_prompts if reference else 1
    return math.sqrt(1 / (WINDOW * max(reading.num_groups, 1)) + 1 / max(num_prompts, 1))


def _band(sensor: str, values: FloatArray, begun: float, relative_error: float, *, is_open: bool) -> Band:
    base, spread = float(np.mean(values, dtype=np.float64)), float(np.std(values, dtype=np.float64))
    half = STANDARD_ERRORS * spread * relative_error + max(LEAST_SPREADS * spread, LEAST_MOVES.get(sensor, 0.0))
    low, high = min(base, begun) - half, max(base, begun) + half
    if is_open:
        return Band(sensor=sensor, low=low, center=min(base, begun), high=math.inf)
    least = 0.0 if float(np.min(values)) >= 0 else -math.inf  # a share or a variance cannot be negative
    return Band(sensor=sensor, low=max(low, least), center=(low + high) / 2, high=high)


def smoothed(readings: Sequence[Reading], sensor: str) -> list[float | None]:
    """Return the mean over each reading and up to WINDOW - 1 before it; None where none of them measured the sensor."""
    return [_mean(readings[max(end - WINDOW, 0) : end], sensor) for end in range(1, len(readings) + 1)]


def positions(readings: Sequence[Reading], bands: Mapping[str, Band]) -> dict[str, float]:
    """Return where each sensor stands now: sensor -> Band.position of its newest smoothed value."""
    return {name: bands[name].position(value) for name, value in newest(readings, bands).items()}


def newest(readings: Sequence[Reading], sensors: Iterable[str]) -> dict[str, float]:
    """Return the newest smoothed value of each sensor that was measured."""
    found = {name: _mean(readings[-WINDOW:], name) for name in sensors}
    return {name: value for name, value in found.items() if value is not None}


def judge(readings: Sequence[Reading], bands: Mapping[str, Band], train: Collection[str]) -> list[Alert]:
    """Return the alerts of a run so far, by update.

    A sensor alerts when its smoothed value was outside its band for PERSISTENCE updates in a row while the smoothed mean of a train
    reward was above its start; again only after it came back.

    Args:
        readings: by update.
        bands: of make_bands.
        train: names of train rewards.
    """
    rises = [_rises(readings[:START], readings[max(end - WINDOW, 0) : end], train) for end in range(1, len(readings) + 1)]
    alerts = []
    for band in bands.values():
        count = 0
        for position, value in enumerate(smoothed(readings, band.sensor)):
            is_out = position >= WINDOW - 1 and value is not None and not band.holds(value)
            count = count + 1 if is_out and rises[position] else 0
            if count == PERSISTENCE and value is not None:
                alerts.append(_alert(band, readings[position], value, rises[position]))
    return sorted(alerts, key=lambda alert: (alert.update, alert.sensor))


def _rises(first: Sequence[Reading], newest: Sequence[Reading], train: Collection[str]) -> dict[str, tuple[float, float]]:
    """Train rewards whose newest mean is above their first: name -> (start, now)."""
    means = {name: (_mean(first, WATCHED + name), _mean(newest, WATCHED + name)) for name in train}
    return {name: (begun, now) for name, (begun, now) in means.items() if begun is not None and now is not None and now > begun}


def _alert(band: Band, reading: Reading, value: float, rises: Mapping[str, tuple[float, float]]) -> Alert:
    side, end = ("below", band.low) if value < band.low else ("above", band.high)
    ends = f"{band.low:.4g} to {band.high:.4g}" if math.isfinite(band.high) else f"{band.low:.4g} or more"
    rose = ", ".join(f"{name} rose {begun:.4g} -> {now:.4g}" for name, (begun, now) in sorted(rises.items()))
    sentence = (
        f"sensor {band.sensor} is {value:.4g} at update {reading.update}, {side} {end:.4g} (the base model's band: {ends}), while {rose}: "
        "the reward may be hacked, look at the samples"
    )
    return Alert(sensor=band.sensor, update=reading.update, value=value, sentence=sentence)


def _mean(readings: Sequence[Reading], sensor: str) -> float | None:
    measured = [value for reading in readings if (value := reading.value(sensor)) is not None]
    return sum(measured) / len(measured) if measured else None
