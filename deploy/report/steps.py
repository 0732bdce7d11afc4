"""Step-exact curves as JSON: one entry an update and one an evaluation, for whoever draws them elsewhere (Grafana's step panel, a notebook)."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from deploy.report.curves import throughput
from deploy.report.records import EvaluationRecord, RunHistory, UpdateRecord

_RATIOS = {"mean": "ratio_mean", "min": "ratio_min", "max": "ratio_max"}
_CLIPS = {"all": "clip_fraction", "up": "clip_fraction_up", "down": "clip_fraction_down"}


def step_curves(history: RunHistory) -> dict[str, Any]:
    """Return what /api/curves.json answers; a number that is not there or not finite is null.

    Of an update that two starts ran, the later start's record counts; where a start began again, what earlier ones wrote from there on is
    left out. A policy version is the number of the update that made it, so evaluations lie on the same axis; version 0 is the base model.
    """
    rates = throughput(history)
    return {
        "run": history.name,
        "config_digest": history.config_digest,
        "starts": history.incarnations,
        "updates_planned": history.config.get("schedule", {}).get("num_updates"),
        "updates": [
            _update(record, elapsed_s, rate) for record, elapsed_s, rate in zip(history.updates, history.elapsed_s, rates, strict=True)
        ],
        "evaluations": [_evaluation(record, history.elapsed_at(record.version)) for record in history.evaluations],
    }


def _update(record: UpdateRecord, elapsed_s: float, rate: float | None) -> dict[str, Any]:
    learner = record.learner
    groups = sum(record.staleness.values())
    return {
        "update": record.update,
        "incarnation": record.incarnation,
        "time_unix": record.time_unix,
        "elapsed_s": elapsed_s,
        "rewards": {name: {key: _finite(value) for key, value in asdict(summary).items()} for name, summary in record.rewards.items()},
        "ratio": _named(learner, _RATIOS),
        "clip": _named(learner, _CLIPS),
        "kl": {name: _finite(value) for name, value in learner.items() if "kl" in name.split("_")},
        "learner": {name: _finite(value) for name, value in learner.items()},
        "staleness": {
            "groups": {str(age): count for age, count in record.staleness.items()},
            "mean": sum(age * count for age, count in record.staleness.items()) / groups if groups else None,
            "max": max(record.staleness, default=None),
        },
        "flat_group_share": _finite(record.flat_group_share),
        "drops": dict(record.drops),
        "images": record.images,
        "images_per_s": rate,
        "seconds": {name: _finite(value) for name, value in record.seconds.items()},
        "image_statistics": {name: _finite(value) for name, value in record.image_statistics.items()},
    }


def _evaluation(record: EvaluationRecord, elapsed_s: float | None) -> dict[str, Any]:
    return {
        "version": record.version,
        "is_base": record.version == 0,
        "snapshot": record.snapshot,
        "protocol": record.digest,
        "elapsed_s": elapsed_s,
        "rewards": {
            name: {
                "mean": _finite(result.mean),
                "coverage": _finite(result.coverage),
                "tasks": {task: {"mean": _finite(found.mean), "n": found.n} for task, found in result.tasks.items()},
            }
            for name, result in record.rewards.items()
        },
    }


def _named(learner: Mapping[str, float], names: Mapping[str, str]) -> dict[str, float | None]:
    return {short: _finite(learner[name]) for short, name in names.items() if name in learner}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
