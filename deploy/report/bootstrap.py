"""Bootstrap intervals over prompts, within tasks, with fixed seeds: one method for every table that compares or reports evaluations."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploy.report.compare import BOOTSTRAP_SEED, NUM_RESAMPLES

METHOD = (
    f"95 % percentile bootstrap over prompts within tasks, {NUM_RESAMPLES:,} resamples, seed {BOOTSTRAP_SEED}; "
    "a prompt's images are averaged first; the mean is unweighted over tasks"
)
_CHUNK = 1_000  # resamples a draw: bounds the memory
_QUANTILES = (2.5, 97.5)
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float


def resampled_means(values: Array, stream: int) -> Array:
    """Return the means of bootstrap resamples of the rows.

    Args:
        values: [n, C] float64, n >= 1: a prompt a row. All columns are resampled by the same draws, so differences of columns are paired.
        stream: which stream of the fixed seed draws; a task's position, so that tasks are independent.

    Returns:
        [NUM_RESAMPLES, C].
    """
    generator = np.random.default_rng([BOOTSTRAP_SEED, stream])
    chunks = []
    for _ in range(NUM_RESAMPLES // _CHUNK):
        drawn = generator.integers(0, len(values), (_CHUNK, len(values)))
        chunks.append(np.stack([column[drawn].mean(axis=1) for column in values.T], axis=1))
    return np.concatenate(chunks)


def estimates(tasks: Sequence[Array]) -> list[list[Estimate]]:
    """Return the estimates of every column, a task at a time, and in all.

    Args:
        tasks: one [n, C] array a task.

    Returns:
        One list of C estimates a task, then one for the unweighted mean over tasks (percentile intervals, Efron 1979).
    """
    resampled = [resampled_means(values, position) for position, values in enumerate(tasks)]
    means = [values.mean(axis=0) for values in tasks]
    pairs = [*zip(means, resampled, strict=True), (np.mean(means, axis=0), np.mean(resampled, axis=0))]
    return [[_estimate(float(value), column) for value, column in zip(mean, drawn.T, strict=True)] for mean, drawn in pairs]


def _estimate(value: float, resampled: Array) -> Estimate:
    low, high = np.percentile(resampled, _QUANTILES)
    return Estimate(value=value, low=float(low), high=float(high))


def by_prompt(rows: Iterable[tuple[str, str, Sequence[float]]]) -> dict[str, Array]:
    """Average the images of each prompt.

    Args:
        rows: (task, prompt id, C numbers) an image.

    Returns:
        Task -> [n, C], tasks and prompts in the order of their first image.
    """
    found: dict[str, dict[str, list[Sequence[float]]]] = {}
    for task, prompt_id, numbers in rows:
        found.setdefault(task, {}).setdefault(prompt_id, []).append(numbers)
    return {
        task: np.array([np.mean(np.asarray(images, dtype=np.float64), axis=0) for images in prompts.values()], dtype=np.float64)
        for task, prompts in found.items()
    }
