"""The frozen evaluation's curves: by update, by running minutes, and as points over the train rewards."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

from deploy.report.compare import MEAN
from deploy.report.drawing import INK, Panel, as_array, color, legend, make_axes, to_uri
from deploy.report.records import EvaluationRecord, RunHistory

MAX_EVALUATED_REWARDS = 3


def draw_over_training(axes: Axes, history: RunHistory, tones: Mapping[str, str]) -> bool:
    """Lay the evaluation's means over train reward curves, as diamonds in the reward's color.

    Args:
        axes: whose x axis is the update; version 0 is the base model.
        history: of the run.
        tones: reward -> color of its curve.

    Returns:
        Whether any of these rewards has been evaluated.
    """
    found = False
    for name, tone in tones.items():
        placed = [(record.version, record.rewards[name].mean) for record in history.evaluations if name in record.rewards]
        if placed:
            axes.plot(
                [version for version, _ in placed], as_array([mean for _, mean in placed]), color=tone, linestyle="none", marker="D",
                markersize=5.5, markeredgecolor="white", markeredgewidth=0.8, zorder=5, label=None if found else "frozen evaluation",
            )  # fmt: skip
            found = True
    return found


def evaluations(history: RunHistory) -> list[Panel]:
    """The frozen evaluation by task and its mean, over updates and over running minutes."""
    if not history.evaluations:
        return []
    names = list(history.evaluations[-1].rewards)[:MAX_EVALUATED_REWARDS]
    found = [_evaluation_panel(history, name, by_time=by_time) for name in names for by_time in (False, True)]
    return [panel for panel in found if panel is not None]


def _evaluation_panel(history: RunHistory, name: str, *, by_time: bool) -> Panel | None:
    placed: list[tuple[float, EvaluationRecord]] = []
    for record in history.evaluations:
        seconds = history.elapsed_at(record.version)
        if name in record.rewards and (seconds is not None or not by_time):
            placed.append((seconds / 60 if by_time and seconds is not None else record.version, record))
    if len(placed) < 2:
        return None
    figure, axes = make_axes()
    tasks = list(dict.fromkeys(task for _, record in placed for task in record.rewards[name].tasks))
    where = [position for position, _ in placed]
    for position, task in enumerate(tasks if len(tasks) > 1 else []):
        values = [_task_mean(record, name, task) for _, record in placed]
        axes.plot(where, values, color=color(position), linewidth=1.3, marker="o", markersize=2.5, alpha=0.85, label=task)
    means = as_array([record.rewards[name].mean for _, record in placed])
    axes.plot(where, means, color=INK, linewidth=2.6, marker="o", markersize=4, label=MEAN if len(tasks) > 1 else name)
    axes.set_xlabel("running minutes" if by_time else "update", loc="right")
    if all(0 <= row <= 1 for _, record in placed for row in _means(record, name)):
        axes.set_ylim(-0.02, 1.03)
    legend(axes, 4)
    title = f"Frozen evaluation: {name}" + (", by time" if by_time else "")
    caption = "The same prompts and seeds at every point; update 0 is the base model."
    if by_time:
        caption = "Pauses between starts are not counted, nor is what came before the first update."
    return Panel(title=title, caption=caption, uri=to_uri(figure))


def _means(record: EvaluationRecord, name: str) -> list[float]:
    found = [record.rewards[name].mean, *(task.mean for task in record.rewards[name].tasks.values())]
    return [mean for mean in found if mean is not None]


def _task_mean(record: EvaluationRecord, name: str, task: str) -> float:
    found = record.rewards[name].tasks.get(task)
    return np.nan if found is None or found.mean is None else found.mean
