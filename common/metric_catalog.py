"""Every metric that flowfleet shows at /metrics, as data: what RunMetrics makes, docs/metrics.md tells, and dashboards and alerts may ask for.

Prometheus' conventions: prefix flowfleet_, base units (seconds, bytes, ratio in [0, 1]), counters end in _total, labels few and bounded. Each
series of a run has the label `run` besides those named here. A gauge of the newest update is taken from its metrics file, so it
survives a restart; a counter begins at 0 with each Coordinator.
"""

from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["gauge", "counter", "histogram"]
Area = Literal["learning", "pipeline", "rewards", "fleet", "images", "evaluation", "store"]
PREFIX: Final = "flowfleet_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric family."""

    name: str  # as exposed, with prefix and suffix
    kind: Kind
    area: Area
    text: str  # the HELP line: one sentence
    labels: tuple[str, ...] = ()  # besides run
    buckets: tuple[float, ...] = ()  # of a histogram


def _gauge(area: Area, name: str, text: str, *labels: str) -> Metric:
    return Metric(name=PREFIX + name, kind="gauge", area=area, text=text, labels=labels)


def _counter(area: Area, name: str, text: str, *labels: str) -> Metric:
    return Metric(name=f"{PREFIX}{name}_total", kind="counter", area=area, text=text, labels=labels)


def _histogram(area: Area, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Metric:
    return Metric(name=PREFIX + name, kind="histogram", area=area, text=text, labels=labels, buckets=buckets)


LEARNING: Final = (
    _gauge(
        "learning",
        "run_info",
        "1; the labels tell the objective, the newest start and the version of flowfleet.",
        "objective",
        "incarnation",
        "version",
    ),
    _gauge("learning", "update", "Newest finished update."),
    _gauge("learning", "updates_planned", "schedule.num_updates."),
    _gauge("learning", "weighted_reward", "Mean weighted train reward of the newest update's kept images."),
    _gauge("learning", "reward_mean", "Mean raw score of the newest update's images.", "reward"),
    _gauge("learning", "reward_group_std", "Standard deviation inside groups, mean over the newest update's groups.", "reward"),
    _gauge("learning", "reward_flat_ratio", "Share of the newest update's groups whose scores of this reward do not differ.", "reward"),
    _gauge("learning", "flat_groups_ratio", "Share of the newest update's groups in which no train reward differs: they teach nothing."),
    _gauge("learning", "advantage_abs_mean", "Mean size of the newest update's advantages."),
    _gauge("learning", "loss", "Loss of the newest update, mean over its optimizer steps."),
    _gauge("learning", "gradient_norm", "Gradient norm before clipping, mean over the newest update's optimizer steps."),
    _gauge("learning", "learning_rate", "Learning rate of the newest update."),
    _gauge("learning", "policy_ratio_mean", "Mean of exp(log-prob - anchor log-prob); objectives without a ratio do not show it."),
    _gauge("learning", "policy_ratio_min", "Least ratio of the newest update."),
    _gauge("learning", "policy_ratio_max", "Largest ratio of the newest update."),
    _gauge("learning", "clipped_ratio", "Share of samples whose gradient the clip stops, by side (up, down).", "side"),
    _gauge(
        "learning",
        "kl",
        "Divergences of the newest update as the objective names them (kl, kl_exact, approx_kl, kl_behavior ...).",
        "estimator",
    ),
    _gauge("learning", "objective_value", "Whatever else the objective reports of the newest update, by its name; at most 64.", "name"),
    _counter("learning", "optimizer_steps", "Optimizer steps taken."),
    _counter("learning", "skipped_steps", "Optimizer steps skipped since loss or gradient was not finite."),
    _counter("learning", "images_consumed", "Images of the groups that updates consumed."),
)
PIPELINE: Final = (
    _gauge("pipeline", "policy_version", "Newest published policy version."),
    _histogram("pipeline", "group_staleness_updates", "Staleness of consumed groups, in updates.", (0, 1, 2, 3, 4, 6, 8, 16)),
    _gauge("pipeline", "max_staleness_updates", "schedule.max_staleness: no consumed group is staler."),
    _gauge("pipeline", "groups", "Groups by state of the ledger.", "state"),
    _counter("pipeline", "groups_issued", "Group numbers issued."),
    _counter("pipeline", "groups_consumed", "Groups consumed."),
    _counter("pipeline", "groups_dropped", "Groups dropped, by reason.", "reason"),
    _gauge("pipeline", "conservation_error_groups", "Issued groups that are in no state, or in two: always 0; else the run is ended."),
    _gauge("pipeline", "idle_ratio", "Share of the last minute that a role's slots spent waiting for others.", "role"),
    _counter("pipeline", "phase_seconds", "Seconds by role and phase, over its slots.", "role", "phase"),
    _gauge("pipeline", "learner_wait_seconds", "How long the learner has been waiting for its next batch; 0 while it works."),
    _gauge("pipeline", "idle_seconds", "Seconds since the last commit, publication or learnt micro-batch of the whole run."),
    _gauge("pipeline", "run_ending", "1 once the learner has left, a stop was asked for, or the outcome is set: silence then is no fault."),
    _gauge("pipeline", "stall_timeout_seconds", "schedule.stall_timeout_s: after so many idle seconds the run ends, state saved."),
    _counter("pipeline", "leases_expired", "Leases that expired: their slot went silent."),
    _counter("pipeline", "leases_failed", "Leases that came back failed, by role.", "role"),
)
REWARDS: Final = (
    _gauge("rewards", "reward_coverage_ratio", "Scored over applicable images of the newest groups.", "reward"),
    _gauge("rewards", "reward_pool_down", "1 while every server of the reward has its breaker open.", "reward"),
    _gauge("rewards", "reward_backlog_groups", "Committed training groups that the reward has not scored.", "reward"),
    _counter("rewards", "reward_images", "Images that the reward was asked to score.", "reward"),
    _counter("rewards", "reward_calls", "Calls of the scorer; images over calls is the mean batch.", "reward"),
    _counter("rewards", "reward_null_scores", "Images that got no score, by the error's first words; at most 16 reasons a reward.", "reward", "reason"),
    _histogram(
        "rewards", "reward_latency_seconds", "Seconds that an image's scoring took, as its score file tells.",
        (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100), "reward",
    ),
)  # fmt: skip
FLEET: Final = (
    _gauge("fleet", "slots", "Slots by role and state (starting, running, draining, resting).", "role", "state"),
    _gauge("fleet", "slots_wanted", "Size that each pool is to have (rollout, reward.NAME).", "pool"),
    _counter("fleet", "rollout_images", "Images sampled, by slot.", "slot"),
    _gauge("fleet", "slot_policy_version", "Policy version that a slot bound last.", "slot"),
    _gauge("fleet", "slot_idle_ratio", "Share of the last minute that a slot spent waiting for others.", "slot"),
    _gauge("fleet", "slot_silent_seconds", "Seconds since a slot was heard.", "slot"),
    _gauge("fleet", "slot_refused", "1 while a slot gets no lease since its weights did not arrive as published.", "slot"),
    _counter("fleet", "receipt_mismatches", "Load receipts that differed from the publication."),
    _counter("fleet", "slot_crashes", "Processes that ended unasked, by role.", "role"),
)
IMAGES: Final = (
    _gauge("images", "sensor_value", "Smoothed image statistic or watch reward.", "sensor"),
    _gauge("images", "sensor_low", "Lower end of the sensor's band.", "sensor"),
    _gauge("images", "sensor_high", "Upper end of the sensor's band; absent where it has none.", "sensor"),
    _gauge("images", "sensor_position", "Where the sensor stands in its band: -1 and 1 are its ends.", "sensor"),
    _counter("images", "sensor_alerts", "Times that the sensor left its band while a train reward rose.", "sensor"),
)
EVALUATION: Final = (
    _gauge(
        "evaluation",
        "evaluation_score",
        "Frozen evaluation: mean of a task; task all: unweighted mean over tasks.",
        "reward",
        "task",
        "snapshot",
    ),
    _gauge("evaluation", "evaluation_base_score", "The same of the base model.", "reward", "task"),
    _gauge("evaluation", "evaluation_version", "Policy version of the newest finished evaluation.", "snapshot"),
    _gauge("evaluation", "evaluations_pending", "Evaluations under way."),
)
STORE: Final = (
    _gauge("store", "store_bytes", "Bytes in the run directory, by kind (groups, policy, learner, other).", "kind"),
    _gauge("store", "store_limit_bytes", "store.max_bytes."),
    _gauge("store", "store_up", "0 while the store is away and the run waits for it."),
    _gauge("store", "learner_state_age_updates", "Updates since the newest durable LearnerState: what a crash would replay."),
    _gauge("store", "learner_state_every_updates", "learner.state_interval: how old a LearnerState may become."),
)
CATALOG: Final[tuple[Metric, ...]] = (*LEARNING, *PIPELINE, *REWARDS, *FLEET, *IMAGES, *EVALUATION, *STORE)
BY_NAME: Final = {metric.name: metric for metric in CATALOG}
