"""Sums of what the losses report, and the metrics record of an update."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from common.types import Manifest
from learner.advantages import FLAT_SPREAD, AdvantageBatch
from learner.objectives.base import LossTerm


class Tally:
    """Mean, least and largest of every named per-sample value that an update's losses gave."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: Counter[str] = Counter()
        self._ends: dict[str, tuple[float, float]] = {}

    def add(self, term: LossTerm) -> None:
        """Count one loss term's values."""
        for name, values in term.means.items():
            self.add_values(name, values)
        for name, values in term.ranges.items():
            self.add_values(f"{name}_mean", values)
            low, high = self._ends.get(name, (float("inf"), float("-inf")))
            self._ends[name] = min(low, float(values.min())), max(high, float(values.max()))

    def add_values(self, name: str, values: torch.Tensor) -> None:
        """Count values whose mean is reported under `name`."""
        self._sums[name] = self._sums.get(name, 0.0) + float(values.double().sum())
        self._counts[name] += values.numel()

    def add_number(self, name: str, value: float) -> None:
        """Count one value that is reported under `name`."""
        self._sums[name] = self._sums.get(name, 0.0) + value
        self._counts[name] += 1

    def merge(self, other: "Tally") -> None:
        """Count everything that another tally counted."""
        for name, total in other._sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + total
            self._counts[name] += other._counts[name]
        for name, (low, high) in other._ends.items():
            found = self._ends.get(name, (low, high))
            self._ends[name] = min(low, found[0]), max(high, found[1])

    def encode(self, loss: float) -> bytes:
        """Return everything counted, with this rank's part of the loss, as JSON: floats survive it bit for bit."""
        return json.dumps({"loss": loss, "sums": self._sums, "counts": self._counts, "ends": self._ends}).encode()

    @classmethod
    def decode(cls, content: bytes) -> tuple["Tally", float]:
        """Return what `encode` was called with."""
        facts = json.loads(content)
        tally = cls()
        tally._sums, tally._counts = facts["sums"], Counter(facts["counts"])
        tally._ends = {name: (low, high) for name, (low, high) in facts["ends"].items()}
        return tally, facts["loss"]

    def metrics(self) -> dict[str, float]:
        """The means by name, and _min and _max of ranges; names that were never given are absent."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        lows = {f"{name}_min": low for name, (low, _) in self._ends.items()}
        highs = {f"{name}_max": high for name, (_, high) in self._ends.items()}
        return {**means, **lows, **highs}


def reward_summary(manifest: Manifest) -> dict[str, dict[str, float | None]]:
    """Return per reward (trained or watched) mean, std_in_group, coverage and flat_share over the groups it applies to.

    mean and std_in_group are None when nothing was scored; coverage is scored / asked; a flat group's scores differ by <= 1e-8.
    """
    names = sorted({name for group in manifest.groups for name in group.scores})
    return {name: _summarize([group.scores[name] for group in manifest.groups if name in group.scores]) for name in names}


def _summarize(groups: list[tuple[float | None, ...]]) -> dict[str, float | None]:
    scored = [[score for score in scores if score is not None] for scores in groups]
    present = [scores for scores in scored if scores]
    values = [score for scores in present for score in scores]
    return {
        "mean": float(np.mean(values)) if values else None,
        "std_in_group": float(np.mean([np.std(scores) for scores in present])) if present else None,
        "coverage": len(values) / sum(len(scores) for scores in groups),
        "flat_share": float(np.mean([not scores or max(scores) - min(scores) <= FLAT_SPREAD for scores in scored])),
    }


def metrics_record(
    manifest: Manifest, batch: AdvantageBatch, *, incarnation: int, time_unix: float, seconds: Mapping[str, float],
    learner: Mapping[str, float], image_statistics: Mapping[str, float],
) -> dict[str, Any]:  # fmt: skip
    """Return the JSON record of an update (metrics/update_*.json); numbers that are not finite are None."""
    staleness = Counter(str(manifest.update - 1 - group.version) for group in manifest.groups)
    return {
        "update": manifest.update,
        "incarnation": incarnation,
        "time_unix": time_unix,
        "seconds": dict(seconds),
        "learner": _finite(learner),
        "rewards": reward_summary(manifest),
        "flat_group_share": float(batch.flat.mean()),
        "weighted_reward": _weighted_reward(batch),
        "staleness": dict(sorted(staleness.items())),
        "drops": dict(Counter(drop.reason for drop in manifest.drops)),
        "images": int(batch.mask.size),
        "image_statistics": _finite(image_statistics),
    }


def _weighted_reward(batch: AdvantageBatch) -> float | None:
    """Mean weighted train reward of the kept samples, None when none was kept."""
    kept = batch.rewards[~np.isnan(batch.rewards)]
    return float(kept.mean()) if kept.size else None


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def live_metrics(record: Mapping[str, Any], batch: AdvantageBatch) -> dict[str, float]:
    """Return the record as flat numbers for the live line and /metrics.

    Names: the learner's own (loss, kl, ratio_mean ...); reward (mean weighted train reward of kept samples); reward.<name> (mean raw
    score); flat_group_share; staleness (mean, in updates); images; images_per_s; seconds.wait, .read, .learn, .save. What does not
    exist is absent.
    """
    weighted = _weighted_reward(batch)
    groups = sum(record["staleness"].values())
    elapsed = sum(record["seconds"].values())
    rewards = {f"reward.{name}": summary["mean"] for name, summary in record["rewards"].items() if summary["mean"] is not None}
    return {
        **{name: value for name, value in record["learner"].items() if value is not None},
        **rewards,
        **({} if weighted is None else {"reward": weighted}),
        **({"images_per_s": record["images"] / elapsed} if elapsed > 0 else {}),
        **{f"seconds.{name}": seconds for name, seconds in record["seconds"].items()},
        "flat_group_share": record["flat_group_share"],
        "staleness": sum(int(lag) * count for lag, count in record["staleness"].items()) / groups,
        "images": float(record["images"]),
    }
