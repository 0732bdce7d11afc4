"""The report's curves: each function draws one panel from a RunHistory, or none where there is nothing to draw."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from deploy.report.drawing import INK, LIGHT_TO_DARK, MUTED, ROLES, Panel, as_array, color, legend, make_axes, marker, smooth, to_uri
from deploy.report.evaluation_curves import draw_over_training, evaluations
from deploy.report.records import RunHistory, UpdateRecord

MAX_UNIT_REWARD = 1.5  # rewards up to here share one panel
LEAD_SIZE = (13.8, 3.3)  # the first reward panel's, inches: it is what a reader looks for
Unit = Literal["share", "groups", "seconds"]
Lines = Mapping[str, Sequence[float]]  # label -> values, one an update
_KL_NAMES = {
    "kl": "KL to the base",
    "kl_guided": "distance to the guided base",
    "kl_exact": "KL, exact",
    "approx_kl": "KL to the anchor (estimate)",
    "kl_behavior": "distance to behavior",
}
_CLIP_NAMES = {"clip_fraction": "clipped", "clip_fraction_up": "clipped above", "clip_fraction_down": "clipped below"}
_RATIO_NAMES = {"ratio_mean": "mean", "ratio_max": "max", "ratio_min": "min"}


def draw_training(history: RunHistory) -> list[Panel]:
    """Return the panels of training: rewards, frozen evaluation, objective."""
    return [*train_rewards(history), *draw_objective(history)]


def draw_objective(history: RunHistory) -> list[Panel]:
    """Return the panels of training besides the rewards: frozen evaluation, objective."""
    drawn = (make(history) for make in (kl, clip_fraction, ratio, step_size, flat_groups))
    return [*evaluations(history), *(panel for panel in drawn if panel is not None)]


def draw_fleet(history: RunHistory) -> list[Panel]:
    """Return the panels of the fleet: time, throughput, staleness, drops."""
    drawn = (make(history) for make in (time_by_role, images_per_second, staleness, drops))
    return [panel for panel in drawn if panel is not None]


def _numbers(history: RunHistory) -> list[int]:
    return [record.update for record in history.updates]


def _finish(axes: Axes, history: RunHistory, *, columns: int = 3) -> None:
    """Label, mark resumes, add the legend."""
    axes.set_xlabel("update", loc="right")
    for before, record in pairwise(history.updates):
        if before.incarnation != record.incarnation:
            axes.axvline(record.update - 0.5, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
    legend(axes, columns)


def train_rewards(history: RunHistory) -> list[Panel]:
    """Mean reward of the samples an update trains on, with the mean spread inside groups."""
    names = sorted({name for record in history.updates for name in record.rewards})
    scales = {
        name: max((abs(r.rewards[name].mean or 0.0) for r in history.updates if name in r.rewards), default=0.0) for name in names
    }  # fmt: skip
    unit = [name for name in names if scales[name] <= MAX_UNIT_REWARD]
    shared = [unit] if unit else []
    groups = [*shared, *([name] for name in names if name not in unit)]
    return [_train_reward_panel(history, group, names, is_wide=group is groups[0]) for group in groups]


def _train_reward_panel(history: RunHistory, drawn: list[str], names: list[str], *, is_wide: bool) -> Panel:
    figure, axes = make_axes(*(LEAD_SIZE if is_wide else ()))
    numbers = _numbers(history)
    for name in drawn:
        tone = color(names.index(name))
        found = [record.rewards.get(name) for record in history.updates]
        means = [None if summary is None else summary.mean for summary in found]
        spread = smooth([None if summary is None else summary.std_in_group for summary in found])
        line = smooth(means)
        axes.fill_between(numbers, line - spread, line + spread, color=tone, alpha=0.10, linewidth=0)
        axes.plot(numbers, as_array(means), color=tone, alpha=0.35, linewidth=1.0)
        axes.plot(numbers, line, color=tone, label=name, marker=marker(len(numbers)), markersize=3)
    evaluated = draw_over_training(axes, history, {name: color(names.index(name)) for name in drawn})
    _finish(axes, history, columns=6 if is_wide else 3)
    title = "Train rewards" if len(drawn) > 1 or len(names) == len(drawn) else f"Train reward: {drawn[0]}"
    caption = "Thin: mean of each update's samples; thick: smoothed; band: ± the mean standard deviation inside groups"
    caption += "; diamonds: the frozen evaluation of the same reward." if evaluated else "."
    return Panel(title=title, caption=caption, uri=to_uri(figure), is_wide=is_wide)


def _learner_lines(history: RunHistory, names: dict[str, str]) -> tuple[dict[str, list[float]], list[int]]:
    present = [name for name in names if any(name in record.learner for record in history.updates)]
    return {names[name]: [record.learner.get(name, np.nan) for record in history.updates] for name in present}, _numbers(history)


def _line_panel(history: RunHistory, names: dict[str, str], scale: Callable[[Axes, Lines], None], text: tuple[str, str]) -> Panel | None:
    """A panel of learner metrics under their labels; None when no update has any of them."""
    lines, numbers = _learner_lines(history, names)
    if not lines:
        return None
    figure, axes = make_axes()
    for position, (label, values) in enumerate(lines.items()):
        axes.plot(numbers, values, color=color(position), label=label, marker=marker(len(numbers)), markersize=3, linewidth=1.4)
    scale(axes, lines)
    _finish(axes, history)
    return Panel(title=text[0], caption=text[1], uri=to_uri(figure))


def kl(history: RunHistory) -> Panel | None:
    """KL divergences the objective reports; logarithmic when they span more than two decades."""

    def scale(axes: Axes, lines: Lines) -> None:
        positive = [value for values in lines.values() for value in values if value > 0]
        if positive and max(positive) > 100 * min(positive):
            axes.set_yscale("log")

    return _line_panel(history, _KL_NAMES, scale, ("KL", "How far the policy has moved; a steady rise is normal, a jump is not."))


def clip_fraction(history: RunHistory) -> Panel | None:
    """Share of samples whose gradient the clip stops."""

    def scale(axes: Axes, _: Lines) -> None:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        axes.set_ylim(bottom=0)

    return _line_panel(history, _CLIP_NAMES, scale, ("Clip fraction", "Share of samples whose gradient the clip stops."))


def ratio(history: RunHistory) -> Panel | None:
    """Mean and ends of the probability ratios."""

    def scale(axes: Axes, _: Lines) -> None:
        axes.axhline(1.0, color=MUTED, linewidth=0.8)
        axes.ticklabel_format(axis="y", useOffset=False)

    return _line_panel(history, _RATIO_NAMES, scale, ("Ratio", "Policy over anchor, per sample and step; 1 = unmoved."))


def step_size(history: RunHistory) -> Panel | None:
    """Gradient norm."""

    def scale(axes: Axes, _: Lines) -> None:
        axes.set_ylim(bottom=0)

    return _line_panel(history, {"grad_norm": "gradient norm"}, scale, ("Gradient norm", "Before clipping, mean of the update's steps."))


def flat_groups(history: RunHistory) -> Panel | None:
    """Share of groups without any spread: they train nothing."""
    if not history.updates:
        return None
    figure, axes = make_axes()
    numbers = _numbers(history)
    shares = [record.flat_group_share for record in history.updates]
    axes.plot(numbers, shares, color=INK, alpha=0.3, linewidth=1.0)
    axes.plot(numbers, smooth(shares), color=INK, label="all train rewards", marker=marker(len(numbers)), markersize=3)
    names = sorted({name for record in history.updates for name in record.rewards})
    for position, name in enumerate(names if len(names) > 1 else []):
        values = [record.rewards[name].flat_share if name in record.rewards else None for record in history.updates]
        axes.plot(numbers, smooth(values), color=color(position), linewidth=1.2, label=name)
    axes.set_ylim(0, max(1e-2, axes.get_ylim()[1]))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _finish(axes, history)
    return Panel(title="Flat groups", caption="Groups whose samples all score the same teach nothing.", uri=to_uri(figure))


def _stack(history: RunHistory, layers: Sequence[tuple[str, str, Iterable[float]]], unit: Unit, text: tuple[str, str]) -> Panel:
    """Stacked steps, one update wide: layers of (label, color, values)."""
    figure, axes = make_axes()
    edges = np.array([*_numbers(history), _numbers(history)[-1] + 1], dtype=np.float64) - 0.5
    floor = np.zeros(len(history.updates))
    total = np.sum([list(values) for _, _, values in layers], axis=0)
    total = np.where(total == 0, 1.0, total) if unit == "share" else 1.0
    for label, tone, values in layers:
        top = floor + np.array(list(values)) / total
        axes.fill_between(edges, np.append(floor, floor[-1]), np.append(top, top[-1]), step="post", color=tone, label=label, linewidth=0)
        floor = top
    axes.set_ylim(bottom=0)
    if unit == "share":
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if unit == "groups":
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    _finish(axes, history, columns=4)
    return Panel(title=text[0], caption=text[1], uri=to_uri(figure))


def staleness(history: RunHistory) -> Panel | None:
    """How many updates old the policy of each group was, as shares of an update's groups."""
    ages = sorted({age for record in history.updates for age in record.staleness})
    if not ages:
        return None
    tones = {age: LIGHT_TO_DARK[min(age, len(LIGHT_TO_DARK) - 1)] for age in ages}
    layers = [
        (f"{age} update" + ("" if age == 1 else "s"), tones[age], [record.staleness.get(age, 0) for record in history.updates])
        for age in ages
    ]
    return _stack(history, layers, unit="share", text=("Staleness", "Age of the policy that sampled each group, share of groups."))


def time_by_role(history: RunHistory) -> Panel | None:
    """What the learner's seconds of each update went into."""
    names = [name for name in ROLES if any(name in record.seconds for record in history.updates)]
    if not names:
        return None
    layers = [(name, ROLES[name], [record.seconds.get(name, 0.0) for record in history.updates]) for name in names]
    return _stack(history, layers, unit="seconds", text=("Learner's seconds", "Per update: waiting for groups, reading, learning, saving."))


def drops(history: RunHistory) -> Panel | None:
    """Groups dropped, cumulated by reason; no panel when none was."""
    reasons = sorted({reason for record in history.updates for reason in record.drops})
    if not reasons:
        return None
    layers = [
        (reason, color(position + 2), np.cumsum([record.drops.get(reason, 0) for record in history.updates]).tolist())
        for position, reason in enumerate(reasons)
    ]  # fmt: skip
    return _stack(history, layers, unit="groups", text=("Dropped groups", "Cumulated, by reason; each is a file under drops/."))


def images_per_second(history: RunHistory) -> Panel | None:
    """Trained images by the wall clock."""
    rates = throughput(history)
    if not rates:
        return None
    figure, axes = make_axes()
    numbers = _numbers(history)
    axes.plot(numbers, as_array(rates), color=color(4), alpha=0.35, linewidth=1.0)
    axes.plot(numbers, smooth(rates), color=color(4), marker=marker(len(numbers)), markersize=3)
    axes.set_ylim(bottom=0)
    _finish(axes, history)
    return Panel(title="Images per second", caption="Images of an update over its running time, all roles together.", uri=to_uri(figure))


def throughput(history: RunHistory) -> list[float | None]:
    """Images per running second of each update; None where no time passed."""
    elapsed = (0.0, *history.elapsed_s)
    spans = [after - before for before, after in pairwise(elapsed)]
    return [_rate(record, span) for record, span in zip(history.updates, spans, strict=True)]


def _rate(record: UpdateRecord, span_s: float) -> float | None:
    return record.images / span_s if span_s > 0 else None
