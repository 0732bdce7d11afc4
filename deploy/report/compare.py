"""Before against after under the frozen protocol, with paired bootstrap intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploy.report.records import EvaluationRecord, RunHistory

NUM_RESAMPLES = 10_000
_CHUNK = 1_000
BOOTSTRAP_SEED = 20250505
MEAN = "mean over tasks"
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow:
    """One line of the before/after table."""

    reward: str
    task: str  # a tag, or MEAN; "" when prompts carry no tags
    is_mean: bool  # whether this line sums up its reward: MEAN, or the only task
    n: int  # prompts scored in both evaluations
    before: float  # the base model, over those prompts
    after: float  # the newest evaluated version
    difference: float
    low: float  # 95 % interval of the difference
    high: float

    @property
    def verdict(self) -> str:
        """rose | fell | unclear: whether the interval leaves 0."""
        return "rose" if self.low > 0 else "fell" if self.high < 0 else "unclear"


def run_table(history: RunHistory) -> list[TableRow]:
    """Return the before/after table: per reward the mean over tasks, then each task. Empty without a base and a later evaluation.

    Images of one prompt are averaged first; prompts that lack a score on either side are left out of both. The mean is unweighted over
    tasks. Intervals: percentile bootstrap over prompts, within tasks, with a fixed seed.
    """
    base, newest = history.base, history.newest
    if base is None or newest is None:
        return []
    names = [name for name in newest.rewards if name in base.rewards]
    return [row for name in names for row in _reward_rows(name, base, newest)]


def _reward_rows(reward: str, base: EvaluationRecord, newest: EvaluationRecord) -> list[TableRow]:
    before, after = _by_prompt(base, reward), _by_prompt(newest, reward)
    shared = [key for key in before if key in after]
    tasks = list(dict.fromkeys(tag for tag, _ in shared))
    pairs = {
        task: np.array([(before[key], after[key]) for key in shared if key[0] == task], dtype=np.float64)  # [n, 2]
        for task in tasks
    }
    resampled = {task: _resampled_difference(values, position) for position, (task, values) in enumerate(pairs.items())}
    rows = [_row((reward, task), [pairs[task]], [resampled[task]], is_mean=len(tasks) == 1) for task in tasks]
    if len(tasks) > 1:
        rows.insert(0, _row((reward, MEAN), list(pairs.values()), list(resampled.values()), is_mean=True))
    return rows


def _by_prompt(evaluation: EvaluationRecord, reward: str) -> dict[tuple[str, str], float]:
    """(tag, prompt id) -> mean over the prompt's scored images."""
    scores: dict[tuple[str, str], list[float]] = {}
    for row in evaluation.rows:
        value = row.scores.get(reward)
        if value is not None:
            scores.setdefault((row.tag, row.prompt_id), []).append(value)
    return {key: float(np.mean(values)) for key, values in scores.items()}


def _resampled_difference(pairs: Array, position: int) -> Array:
    """Mean differences of bootstrap resamples of the prompts: [n, 2] -> [NUM_RESAMPLES]; each task draws from a stream of its own."""
    generator = np.random.default_rng([BOOTSTRAP_SEED, position])
    differences = pairs[:, 1] - pairs[:, 0]
    shape = (_CHUNK, len(differences))  # a chunk bounds the memory
    means = [differences[generator.integers(0, len(differences), shape)].mean(axis=1) for _ in range(NUM_RESAMPLES // _CHUNK)]
    return np.concatenate(means)


def _row(name: tuple[str, str], pairs: Sequence[Array], resampled: Sequence[Array], *, is_mean: bool) -> TableRow:
    before, after = np.mean([values.mean(axis=0) for values in pairs], axis=0)
    low, high = np.percentile(np.mean(resampled, axis=0), [2.5, 97.5])
    return TableRow(
        reward=name[0],
        task=name[1],
        is_mean=is_mean,
        n=sum(len(values) for values in pairs),
        before=float(before),
        after=float(after),
        difference=float(after - before),
        low=float(low),
        high=float(high),
    )
