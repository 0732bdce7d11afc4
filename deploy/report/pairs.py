"""Two evaluations of the same prompts and seeds held against each other: differences and win rates with their intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deploy.report.bootstrap import Estimate, by_prompt, estimates
from deploy.report.compare import MEAN, TableRow
from deploy.report.records import EvaluationRecord, EvaluationRow

TIE = 1e-8  # scores closer than this are equal: the flat group's bound
ImageKey = tuple[str, str, int]  # tag, prompt id, which image of the prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLine:
    """One task of one reward, the second against the first."""

    row: TableRow  # before = the first, after = the second
    win_rate: Estimate  # share of images on which the second scores higher; ties count half
    wins: int  # images
    ties: int
    losses: int


def keyed_rows(record: EvaluationRecord) -> dict[ImageKey, EvaluationRow]:
    """The images of an evaluation by what they show: the same key is the same prompt and seed in every evaluation of one protocol."""
    found: dict[ImageKey, EvaluationRow] = {}
    seen: dict[tuple[str, str], int] = {}
    for row in record.rows:
        repeat = seen.get((row.tag, row.prompt_id), 0)
        seen[row.tag, row.prompt_id] = repeat + 1
        found[row.tag, row.prompt_id, repeat] = row
    return found


def pair_lines(reward: str, first: EvaluationRecord, second: EvaluationRecord) -> list[PairLine]:
    """Return the mean over tasks, then each task; empty when no image is scored on both sides.

    Images that lack a score on either side are left out of both. A prompt's images are averaged before prompts are resampled, all
    figures of a task on the same resamples, so differences and win rates are paired.
    """
    before, after = keyed_rows(first), keyed_rows(second)
    scored: list[tuple[str, str, Sequence[float]]] = []
    for key, row in before.items():
        other = after.get(key)
        old, new = row.scores.get(reward), other.scores.get(reward) if other is not None else None
        if old is not None and new is not None:
            scored.append((key[0], key[1], (old, new, new - old, _win(new - old))))
    tasks = by_prompt(scored)
    if not tasks:
        return []
    *found, whole = estimates(list(tasks.values()))
    counts = {task: _counts([numbers[3] for tag, _, numbers in scored if tag == task]) for task in tasks}
    lines = [
        _line((reward, task), len(tasks[task]), columns, counts[task], is_mean=len(tasks) == 1)
        for task, columns in zip(tasks, found, strict=True)
    ]
    if len(lines) > 1:
        total = np.sum([*counts.values()], axis=0)
        size = sum(len(values) for values in tasks.values())
        lines.insert(0, _line((reward, MEAN), size, whole, tuple(int(value) for value in total), is_mean=True))
    return lines


def _win(difference: float) -> float:
    return 0.5 if abs(difference) <= TIE else float(difference > 0)


def _counts(wins: Sequence[float]) -> tuple[int, ...]:
    """Wins, ties, losses."""
    return (wins.count(1.0), wins.count(0.5), wins.count(0.0))


def _line(name: tuple[str, str], size: int, columns: Sequence[Estimate], counts: Sequence[int], *, is_mean: bool) -> PairLine:
    before, after, difference, win_rate = columns
    row = TableRow(
        reward=name[0], task=name[1], is_mean=is_mean, n=size, before=before.value, after=after.value,
        difference=difference.value, low=difference.low, high=difference.high,
    )  # fmt: skip
    wins, ties, losses = counts
    return PairLine(row=row, win_rate=win_rate, wins=wins, ties=ties, losses=losses)


def shared_rewards(records: Sequence[EvaluationRecord]) -> list[str]:
    """The rewards that every evaluation holds, in the first one's order."""
    return [name for name in records[0].rewards if all(name in record.rewards for record in records)]


def differences(first: EvaluationRow, second: EvaluationRow | None, rewards: Sequence[str]) -> Mapping[str, float | None]:
    """What the second image scores above the first, by reward; None where either has no score."""
    found: dict[str, float | None] = {}
    for name in rewards:
        old, new = first.scores.get(name), second.scores.get(name) if second is not None else None
        found[name] = None if old is None or new is None else new - old
    return found
