"""The Pipeline dashboard: who waits for whom, how old the groups are, where they stand, what is dropped, and is the store well?"""

from common.store.ledger_entries import GroupState
from deploy.autoscale import AutoscaleSection
from deploy.monitoring.board import Board, Section
from deploy.monitoring.expressions import at_least, buckets, firing_alerts, gauge, increase, mean, or_zero, quantile, rate, rises
from deploy.monitoring.panels import (
    BYTES,
    COUNT,
    GREEN,
    GROUPS_PER_S,
    ORANGE,
    PLAIN,
    RED,
    SECONDS,
    SHARE,
    SLOTS,
    UPDATES,
    PanelBuilder,
    Step,
    above,
    ask,
    frame,
    heat,
    lines,
    now,
    number,
    timeline,
)

LONG = AutoscaleSection().threshold  # a share of the last minute: the live line and the autoscaler draw the same line
ROLES = ('role="learner"', 'role="rollout"', 'role="reward"')
VERDICTS = {
    "0": ("balanced", GREEN),
    "1": ("learner waits for rollouts", ORANGE),
    "2": ("learner waits for scores", ORANGE),
    "3": ("rollouts wait for the learner", "blue"),
}


def board() -> Board:
    """The dashboard."""
    return Board(
        slug="pipeline",
        title="Pipeline",
        text="Who waits, how stale the groups are, where they stand, and whether the store is well.",
        sections=(
            Section(title="Verdict", panels=_summary()),
            Section(title="Who waits", panels=_waits()),
            Section(title="Staleness", panels=_staleness()),
            Section(title="Groups", panels=_groups()),
            Section(title="Store and learner state", panels=_store()),
        ),
    )


def verdict() -> str:
    """PromQL of the live line's sentence: 0 balanced, 1 and 2 the learner waits (rollouts, scores), 3 rollouts wait; a silent role waits 0."""
    learner, rollout, reward = (or_zero(f"sum({gauge('idle_ratio', role)})") for role in ROLES)
    scores_lack = f"{at_least(f'({rollout})', LONG)} * (({rollout}) > bool ({reward}))"
    learner_waits = at_least(f"({learner})", LONG)
    return f"{learner_waits} * (1 + {scores_lack}) + (1 - {learner_waits}) * {at_least(f'({rollout})', LONG)} * 3"


def _summary() -> tuple[PanelBuilder, ...]:
    toward_stall = f"{gauge('idle_seconds')} / {gauge('stall_timeout_seconds')}"
    return (
        number(
            frame(
                "Who waits",
                PLAIN,
                f"Of the last minute, with {LONG:.0%} as long: who holds up the run. More workers help only where the learner waits.",
                width=6,
                height=5,
            ),
            now(verdict()),
            texts=VERDICTS,
        ),
        number(
            frame(
                "Conservation error",
                "suffix:groups",
                "Issued minus consumed, dropped and held groups; anything but 0 is a bug: keep the run directory.",
                width=4,
                height=5,
            ),
            now(gauge("conservation_error_groups")),
            steps=(Step(value=None, color=RED), Step(value=0, color=GREEN), Step(value=1, color=RED)),
        ),
        number(
            frame("Store", PLAIN, "Whether the run directory answers; while it is away the run waits.", width=3, height=5),
            now(gauge("store_up")),
            texts={"0": ("away", RED), "1": ("up", GREEN)},
        ),
        number(
            frame(
                "Toward a stall",
                SHARE,
                "Seconds since anything was committed over schedule.stall_timeout_s; at 100 % the run ends, state saved.",
                width=4,
                height=5,
            ),
            now(toward_stall),
            steps=above((0.5, ORANGE), (0.8, RED)),
        ),
        timeline(
            frame(
                "Alerts that fire",
                PLAIN,
                "Alerts of Prometheus' rules for this run (docs/observability.md says what each means); red is firing.",
                width=7,
                height=5,
            ),
            ask(firing_alerts(), "{{alertname}}"),
            texts={"0": ("quiet", GREEN), "1": ("firing", RED)},
        ),
    )


def _waits() -> tuple[PanelBuilder, ...]:
    return (
        lines(
            frame(
                "Share of time spent waiting, by role",
                SHARE,
                "Of the last minute, mean over the role's slots; above the line a role waits for long.",
                width=12,
            ),
            ask(gauge("idle_ratio"), "{{role}}"),
            steps=above((LONG, ORANGE)),
            low=0,
            high=1,
        ),
        lines(
            frame(
                "What slots are busy with",
                SLOTS,
                "Seconds a second by role and phase, over all slots: how many slots are in it at a time; a phase that grows is the bottleneck.",
                width=12,
            ),
            ask(rate("phase_seconds", "role", "phase"), "{{role}} {{phase}}"),
            style="stacked",
            low=0,
        ),
        lines(
            frame(
                "Learner waits for its batch",
                SECONDS,
                "How long the learner has been without a batch; worry when it is longer than an update.",
            ),
            ask(gauge("learner_wait_seconds"), "learner"),
            low=0,
        ),
        lines(
            frame(
                "Since the last commit",
                SECONDS,
                "Seconds in which nothing was committed or published; at the dashed line the run ends, state saved.",
            ),
            ask(gauge("idle_seconds"), "idle"),
            ask(gauge("stall_timeout_seconds"), "stall timeout"),
            ask(gauge("run_ending"), "1 = the run is ending"),
            dashed="stall timeout",
            low=0,
        ),
        lines(
            frame("Leases lost", COUNT, "Leases that expired (a slot went silent) or failed, over the window; worry when they go on."),
            ask(increase("leases_expired"), "expired"),
            ask(rises("leases_failed", "role"), "failed: {{role}}"),
            low=0,
            style="bars",
        ),
    )


def _staleness() -> tuple[PanelBuilder, ...]:
    return (
        heat(
            frame(
                "Staleness of consumed groups",
                UPDATES,
                "How many groups were consumed at each staleness; nothing lies above schedule.max_staleness.",
                width=12,
            ),
            ask(buckets("group_staleness_updates")),
        ),
        lines(
            frame(
                "Mean and largest staleness",
                UPDATES,
                "Over the window, beside schedule.max_staleness (dashed); a larger one is a bug, always at it means that the learner is behind.",
                width=12,
            ),
            ask(mean("group_staleness_updates"), "mean"),
            ask(quantile(1, "group_staleness_updates"), "largest"),
            ask(gauge("max_staleness_updates"), "max_staleness"),
            dashed="max_staleness",
            low=0,
        ),
    )


def _groups() -> tuple[PanelBuilder, ...]:
    ended = "|".join((GroupState.BATCHED, GroupState.DROPPED))
    under_way, done = gauge("groups", f'state!~"{ended}"'), gauge("groups", f'state=~"{ended}"')
    return (
        lines(
            frame(
                "Groups under way, by state",
                COUNT,
                "Groups of the ledger that are not yet in a batch; generated ones pile up when scoring is slow.",
            ),
            ask(under_way, "{{state}}"),
            style="stacked",
            low=0,
        ),
        lines(
            frame(
                "Batched and dropped groups",
                COUNT,
                "Since the run began; dropped ones should stay few (when most are, the run stops by itself).",
            ),
            ask(done, "{{state}}"),
            low=0,
        ),
        lines(
            frame(
                "Drops by reason", COUNT, "Groups dropped over the window; a reason that goes on wants its remedy (docs/observability.md)."
            ),
            ask(rises("groups_dropped", "reason"), "{{reason}}"),
            style="bars",
            low=0,
        ),
        lines(
            frame("Issued and consumed", GROUPS_PER_S, "Groups a second; consumed well below issued means drops.", width=12),
            ask(rate("groups_issued"), "issued"),
            ask(rate("groups_consumed"), "consumed"),
            low=0,
        ),
        lines(
            frame(
                "Published versions and finished updates", PLAIN, "Both rise together; flat lines mean that the learner stands.", width=12
            ),
            ask(gauge("policy_version"), "published version"),
            ask(gauge("update"), "finished update"),
            low=0,
        ),
    )


def _store() -> tuple[PanelBuilder, ...]:
    return (
        lines(
            frame(
                "Bytes in the run directory",
                BYTES,
                "By kind, against store.max_bytes (dashed); at the cap older groups are retired.",
                width=12,
            ),
            ask(gauge("store_bytes"), "{{kind}}"),
            ask(gauge("store_limit_bytes"), "store.max_bytes"),
            dashed="max_bytes",
            style="stacked",
            low=0,
        ),
        lines(
            frame(
                "Age of the learner's state",
                UPDATES,
                "Updates that a crash would replay, against learner.state_interval (dashed); worry when it stays above.",
                width=12,
            ),
            ask(gauge("learner_state_age_updates"), "age"),
            ask(gauge("learner_state_every_updates"), "state_interval"),
            dashed="state_interval",
            low=0,
        ),
    )
