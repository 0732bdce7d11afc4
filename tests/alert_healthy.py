"""Runs in which nothing is wrong, quick and slow, sampled every 15 s: no alert may fire. And the recorded training curves."""

import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.config import PROJECT
from tests.alert_cases import BY_NAME, quiet_test, run

SCRAPE_S = 15
RECORDED = (
    "tiny-demo-s1", "tiny-demo-1worker-s1", "tiny-demo-lr2e-3-m3-s1", "tiny-geneval-s1", "tiny-geneval-s2", "tiny-geneval-s3",
    "tiny-geneval-kl03-s1", "tiny-geneval-constant-lr-s1", "tiny-geneval-grpo-s1", "tiny-multi-s1", "tiny-ocr-s1",
)  # fmt: skip
COLLAPSED_S = 900  # of images of noise, planted after a recorded curve
NOISE_REWARD = 0.1
MEASURED_STD = 0.3  # of geneval_strict inside groups: .30 to .33 in the mean of recorded runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A healthy run."""

    name: str
    update_s: int
    sampling_s: int  # of an update, at its beginning: nothing is learned meanwhile
    staleness: int
    length_s: int
    stall_timeout_s: int = 900

    def updates(self, time_s: int) -> int:
        """How many are finished."""
        return time_s // self.update_s

    def idle_ratio(self, time_s: int) -> float:
        """The learner's share of the last minute, roughly."""
        return self.sampling_s / self.update_s if self.update_s < 60 else float(self.waits_s(time_s) > 0)

    def waits_s(self, time_s: int) -> int:
        """How long the learner has waited; its last update is saved for up to half a minute of it."""
        since = time_s % self.update_s
        return since if since < self.sampling_s else 0


SHAPES = (
    Shape(name="tiny: updates of 10 s", update_s=10, sampling_s=3, staleness=1, length_s=2400),
    Shape(name="tiny, synchronous: updates of 20 s", update_s=20, sampling_s=10, staleness=0, length_s=2400),
    Shape(name="paper's size: updates of 10 minutes", update_s=600, sampling_s=180, staleness=1, length_s=5 * 3600),
    Shape(
        name="paper's size, synchronous: 20 minutes", update_s=1200, sampling_s=600, staleness=0, length_s=5 * 3600, stall_timeout_s=3600
    ),
)


def runs(values: Iterator[float]) -> str:
    """Samples in promtool's notation, equal neighbors written once."""
    return " ".join(f"{value:.6g}x{sum(1 for _ in same) - 1}" for value, same in itertools.groupby(values))


def healthy_series(shape: Shape) -> dict[str, str]:
    """Every series that an alert asks for."""
    draw = random.Random(7)
    times = range(0, shape.length_s, SCRAPE_S)
    noise = [draw.gauss(0, 1) for _ in range(shape.updates(shape.length_s) + 1)]
    evaluated = [shape.updates(time) // 10 * 10 for time in times]
    planned = shape.updates(shape.length_s) + 100

    def each(value: Callable[[int], float]) -> str:
        return runs(value(time) for time in times)

    def learned(value: Callable[[int, float], float]) -> str:
        return each(lambda time: value(shape.updates(time), noise[shape.updates(time)]))

    def in_flight(time: int, busy: int) -> int:
        return busy if shape.staleness or 30 <= time % shape.update_s < shape.sampling_s or shape.update_s < 60 else 0

    labels = {"job": "flowfleet", "instance": "a:9464"}
    return {
        'up{job="flowfleet",instance="a:9464"}': each(lambda _: 1),
        run("run_info", objective="grpo", incarnation="1", version="0.1.0"): each(lambda _: 1),
        run("update", **labels): learned(lambda update, _: update),
        run("updates_planned", **labels): each(lambda _: planned),
        run("weighted_reward"): learned(lambda update, luck: 0.55 + 0.25 * min(1, update / 100) + 0.06 * luck),
        run("reward_group_std", reward="geneval"): learned(lambda _, luck: 0.3 + 0.03 * luck),
        run("flat_groups_ratio"): learned(lambda _, luck: min(1, abs(0.2 + 0.1 * luck))),
        run("kl", estimator="kl"): learned(lambda update, luck: 1e-6 * (update + 1) ** 2 * (1 + 0.3 * abs(luck))),
        run("policy_ratio_min"): learned(lambda _, luck: 0.999 - 0.0005 * abs(luck)),
        run("policy_ratio_max"): learned(lambda _, luck: 1.001 + 0.0005 * abs(luck)),
        run("clipped_ratio", side="up"): learned(lambda _, luck: 0.1 + 0.02 * luck),
        run("clipped_ratio", side="down"): learned(lambda _, luck: 0.1 - 0.02 * luck),
        run("skipped_steps_total"): each(lambda _: 0),
        run("sensor_alerts_total", sensor="dark_share"): each(lambda _: 0),
        run("evaluation_score", reward="geneval", task="all", snapshot="ema"): runs(
            0.68 + 0.2 * min(1, update / 100) + 0.02 * noise[update] for update in evaluated
        ),
        run("evaluations_pending"): each(lambda time: float(time % (10 * shape.update_s) < shape.update_s / 2)),
        run("policy_version"): learned(lambda update, _: update),
        run("max_staleness_updates"): each(lambda _: shape.staleness),
        run("groups", state="leased"): each(lambda time: in_flight(time, 4)),
        run("groups", state="generated"): each(lambda time: in_flight(time, 1)),
        run("groups", state="ready"): each(lambda time: in_flight(time, 6)),
        run("conservation_error_groups"): each(lambda _: 0),
        run("idle_ratio", role="learner"): each(shape.idle_ratio),
        run("learner_wait_seconds"): each(shape.waits_s),
        run("idle_seconds"): each(lambda time: 0 if in_flight(time, 1) else time % shape.update_s),
        run("stall_timeout_seconds"): each(lambda _: shape.stall_timeout_s),
        run("slots", role="rollout", state="starting"): each(lambda time: float(time < 30)),
        run("slots", role="rollout", state="running"): each(lambda time: float(time >= 30)),
        run("slots_wanted", pool="reward.ocr"): each(lambda _: 1),
        run("slot_policy_version", slot="rollout.0"): learned(lambda update, _: max(0, update - 1)),
        run("slot_idle_ratio", slot="rollout.0"): each(lambda _: 0.2),
        run("slot_refused", slot="rollout.0"): each(lambda _: 0),
        run("receipt_mismatches_total"): each(lambda _: 0),
        run("slot_crashes_total", role="rollout"): each(lambda time: float(time > shape.length_s / 2)),
        **_rewards_and_store(shape, each),
    }  # fmt: skip


def _rewards_and_store(shape: Shape, each: Callable[[Callable[[int], float]], str]) -> dict[str, str]:
    buckets = {"0.1": 0.2, "1": 0.95, "3": 1.0, "10": 1.0, "30": 1.0, "+Inf": 1.0}
    images = 100 / SCRAPE_S
    return {
        run("reward_coverage_ratio", reward="ocr"): each(lambda _: 0.99),
        run("reward_images_total", reward="ocr"): each(lambda time: images * time),
        run("reward_null_scores_total", reward="ocr", reason="timeout"): each(lambda time: 0.01 * images * time),
        run("reward_pool_down", reward="ocr"): each(lambda _: 0),
        run("reward_backlog_groups", reward="ocr"): each(lambda time: 3 * (time // 60 % 2)),
        **{
            run("reward_latency_seconds_bucket", reward="ocr", le=le): each(lambda time, share=share: share * images * time)
            for le, share in buckets.items()
        },
        run("store_limit_bytes"): each(lambda _: 8e9),
        run("store_bytes", kind="groups"): each(lambda time: min(7.5e9, 1e7 * time)),
        run("store_bytes", kind="learner"): each(lambda _: 2e8),
        run("store_up"): each(lambda _: 1),
        run("learner_state_age_updates"): each(lambda time: shape.updates(time) % 3),
        run("learner_state_every_updates"): each(lambda _: 1),
    }  # fmt: skip


def healthy_tests() -> list[dict[str, Any]]:
    """Every alert, at twelve moments of every shape."""
    return [
        quiet_test(
            shape.name, healthy_series(shape), [f"{shape.length_s * part // 12}s" for part in range(1, 12)], f"{SCRAPE_S}s",
            [name for name in BY_NAME if name != "FlowfleetTargetAbsent"],
        )
        for shape in SHAPES
    ]  # fmt: skip


def recorded_tests() -> list[dict[str, Any]]:
    """No recorded run collapsed; each of them did if images of noise followed its last update."""
    return [_recorded(PROJECT / "docs" / "results" / f"{name}.json") for name in RECORDED]


def _recorded(path: Path) -> dict[str, Any]:
    facts = json.loads(path.read_text())
    rewards = _weighted(facts)
    length_s = facts["evaluations"][-1]["seconds"] or COLLAPSED_S
    update_s = length_s / len(rewards)
    times = range(0, int(length_s), SCRAPE_S)
    after = COLLAPSED_S // SCRAPE_S
    shown = [rewards[int(time / update_s)] for time in times] + [NOISE_REWARD] * after
    updates = [int(step * SCRAPE_S / update_s) for step in range(len(shown))]
    scores = [[e for e in facts["evaluations"] if e["seconds"] <= time][-1]["rewards"] for time in times]
    series = {run("weighted_reward"): runs(iter(shown)), run("update"): runs(float(update) for update in updates)}
    for reward in scores[0]:
        name = reward.rpartition(":")[2]
        series[run("evaluation_score", reward=name, task="all", snapshot="ema")] = runs(step[reward]["mean"] for step in scores)
        series[run("reward_group_std", reward=name)] = f"{MEASURED_STD}x{len(times)}"
    moments = [f"{int(time)}s" for time in times[8::8]]
    test = quiet_test(path.stem, series, moments, f"{SCRAPE_S}s", ("FlowfleetRewardCollapse", "FlowfleetEvaluationFalls"))
    return {**test, "promql_expr_test": [_fires("FlowfleetRewardCollapse", "critical", f"{(len(shown) - 1) * SCRAPE_S}s")]}


def _weighted(facts: Mapping[str, Any]) -> list[float]:
    weights = {reward["name"]: reward["weight"] for reward in facts["config"]["reward"] if reward.get("use", "train") == "train"}
    return [sum(weight * update["rewards"][name] for name, weight in weights.items()) for update in facts["train"]]


def _fires(alert: str, severity: str, at: str) -> dict[str, Any]:
    labels = f'ALERTS{{alertname="{alert}",alertstate="firing",run="tiny",severity="{severity}"}}'
    return {"expr": f'ALERTS{{alertname="{alert}",alertstate="firing"}}', "eval_time": at, "exp_samples": [{"labels": labels, "value": 1}]}
