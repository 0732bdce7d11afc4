"""The Learning dashboard: is the reward rising, does the frozen evaluation agree, and is the policy update healthy?"""

from deploy.monitoring.board import Board, Section
from deploy.monitoring.expressions import RANGE, gauge, increase, rate
from deploy.monitoring.panels import (
    COUNT,
    IMAGES_PER_S,
    PLAIN,
    RED,
    SCIENTIFIC,
    SHARE,
    PanelBuilder,
    Step,
    above,
    ask,
    frame,
    lines,
    note,
    now,
    number,
    scatter,
)

MEAN_OF_TASKS, SINGLE_TASKS = 'task="all"', 'task!="all"'
FLAT_LIMIT = 0.5  # beyond this share of groups without a signal, most of the sampling is wasted
STEP_EXACT = """Prometheus keeps what it saw at its own moments: two updates between scrapes show as one, and after a resume from an older state
the curve goes back in `update` while time goes on.

The exact curves, one point an update, come from the run's own files (`history/`, `metrics/`), which a resume rewrites:

`flowfleet report RUN --serve`

[Open the report](${report}) (the **Report** variable above says where it is served; by default on this machine's loopback). It shows the reward
and evaluation by update, sample grids and the table with intervals.
"""


def board() -> Board:
    """The dashboard."""
    return Board(
        slug="learning",
        title="Learning",
        text="Rewards, the frozen evaluation, and the health of the policy update.",
        sections=(
            Section(title="Now", panels=_summary()),
            Section(title="Rewards and the frozen evaluation", panels=_curves()),
            Section(title="Frozen evaluation by task", panels=_tasks()),
            Section(title="Signal", panels=_signal()),
            Section(title="Policy update", panels=_update()),
            Section(title="Optimizer", panels=_optimizer()),
        ),
    )


def _summary() -> tuple[PanelBuilder, ...]:
    scores = gauge("evaluation_score", MEAN_OF_TASKS)
    gain = f"{scores} - on (reward) group_left () {gauge('evaluation_base_score', MEAN_OF_TASKS)}"
    return (
        number(
            frame("Run", PLAIN, "Objective, which start this is, and the version of flowfleet.", width=5, height=4),
            now(gauge("run_info"), "{{objective}}, start {{incarnation}}, {{version}}"),
            shows_name=True,
        ),
        number(
            frame("Update", PLAIN, "Newest finished update, and how many are planned; worry when it stands still.", width=4, height=4),
            now(gauge("update"), "done"),
            now(gauge("updates_planned"), "planned"),
        ),
        number(
            frame(
                "Frozen evaluation",
                PLAIN,
                "Newest frozen evaluation, unweighted mean over tasks: the number to believe.",
                width=5,
                height=4,
            ),
            now(scores, "{{reward}}"),
        ),
        number(
            frame(
                "Gain over the base",
                PLAIN,
                "Newest frozen evaluation minus the base model's; worry when it falls below 0.",
                width=4,
                height=4,
            ),
            now(gain, "{{reward}}"),
            steps=(Step(value=None, color=RED), Step(value=0.0, color="green")),
        ),
        number(
            frame(
                "Flat groups",
                SHARE,
                "Share of groups in which no train reward differs; above half, most sampling teaches nothing.",
                width=3,
                height=4,
            ),
            now(gauge("flat_groups_ratio")),
            steps=above((0.25, "orange"), (FLAT_LIMIT, RED)),
        ),
        number(
            frame(
                "Skipped steps",
                COUNT,
                "Optimizer steps skipped in the time shown, since loss or gradient was not finite; any is bad.",
                width=3,
                height=4,
            ),
            now(increase("skipped_steps", over=RANGE)),
            steps=above((0.5, RED)),
        ),
    )


def _curves() -> tuple[PanelBuilder, ...]:
    return (
        lines(
            frame(
                "Reward curves by time",
                PLAIN,
                "Each reward's mean on the training images, the frozen evaluation over it (thick) and the base model's (dashed); "
                "worry when training rises and the evaluation falls.",
                width=16,
                height=11,
            ),
            ask(gauge("reward_mean"), "{{reward}}: training"),
            ask(gauge("evaluation_score", MEAN_OF_TASKS), "{{reward}}: frozen ({{snapshot}})"),
            ask(gauge("evaluation_base_score", MEAN_OF_TASKS), "{{reward}}: base"),
            strong=": frozen",
            dashed=": base",
        ),
        note(frame("The exact curves", PLAIN, "Where the curves with one point an update are.", width=8, height=11), STEP_EXACT),
        scatter(
            frame(
                "Training reward by update",
                PLAIN,
                "Each reward's mean against the update at the same moment; updates between two scrapes are missing (see the report).",
                width=12,
                height=9,
            ),
            ask(f"max({gauge('update')})", "update"),
            ask(gauge("reward_mean"), "{{reward}}"),
            ask(gauge("weighted_reward"), "weighted"),
        ),
        scatter(
            frame(
                "Frozen evaluation by policy version",
                PLAIN,
                "Each evaluated reward's mean over tasks against the version that was evaluated; the first point is the base.",
                width=12,
                height=9,
            ),
            ask(f"max({gauge('evaluation_version')})", "policy version"),
            ask(gauge("evaluation_score", MEAN_OF_TASKS), "{{reward}}"),
        ),
    )


def _tasks() -> tuple[PanelBuilder, ...]:
    score, base = gauge("evaluation_score", SINGLE_TASKS), gauge("evaluation_base_score", SINGLE_TASKS)
    change = f"{score} - on (reward, task) group_left () {base}"
    return (
        lines(
            frame("Score by task", PLAIN, "Frozen evaluation of each task, the base dashed; worry when one task pays for another."),
            ask(score, "{{reward}} {{task}}"),
            ask(base, "{{reward}} {{task}}: base"),
            dashed=": base",
        ),
        lines(
            frame("Change against the base by task", PLAIN, "Score minus the base model's; a task below 0 got worse."),
            ask(change, "{{reward}} {{task}}"),
            steps=(Step(value=None, color=RED), Step(value=0.0, color="green")),
        ),
        lines(
            frame("Evaluations", PLAIN, "Newest evaluated version and evaluations under way; worry when some stay pending."),
            ask(gauge("evaluation_version"), "evaluated version ({{snapshot}})"),
            ask(gauge("evaluations_pending"), "pending"),
            low=0,
        ),
    )


def _signal() -> tuple[PanelBuilder, ...]:
    return (
        lines(
            frame(
                "Weighted reward", PLAIN, "What the objective climbs: the weighted mean of the kept images; worry when it falls for long."
            ),
            ask(gauge("weighted_reward"), "weighted"),
        ),
        lines(
            frame("Flat groups", SHARE, "Share of groups that teach nothing; above the line most sampling is wasted: harder prompts help."),
            ask(gauge("flat_groups_ratio"), "flat"),
            steps=above((FLAT_LIMIT, RED)),
            low=0,
            high=1,
        ),
        lines(
            frame(
                "Spread inside groups",
                PLAIN,
                "Standard deviation of each reward inside groups; when it goes to 0 there is nothing left to learn.",
            ),
            ask(gauge("reward_group_std"), "{{reward}}"),
            low=0,
        ),
    )


def _update() -> tuple[PanelBuilder, ...]:
    return (
        lines(
            frame(
                "Policy ratio",
                PLAIN,
                "Least, mean and largest exp(log-prob - anchor); far from 1 the update is too large. "
                "Objectives without a ratio show nothing.",
            ),
            ask(gauge("policy_ratio_max"), "max"),
            ask(gauge("policy_ratio_mean"), "mean"),
            ask(gauge("policy_ratio_min"), "min"),
        ),
        lines(
            frame(
                "Clipped samples",
                SHARE,
                "Share of samples that the clip stops, by side; above a half the step is too large, always 0 it is too small.",
            ),
            ask(gauge("clipped_ratio"), "{{side}}"),
            steps=above((0.5, RED)),
            low=0,
            high=1,
        ),
        lines(
            frame("Divergence by estimator", SCIENTIFIC, "KL as the objective names its estimators; worry when it climbs without end."),
            ask(gauge("kl"), "{{estimator}}"),
        ),
        lines(
            frame("Size of advantages", PLAIN, "Mean size of the advantages; near 0 nothing is learnt."),
            ask(gauge("advantage_abs_mean"), "mean size"),
            low=0,
        ),
        lines(
            frame("Loss", SCIENTIFIC, "Mean over optimizer steps; a policy loss need not fall, but it must stay finite and quiet."),
            ask(gauge("loss"), "loss"),
        ),
        lines(
            frame("Of the objective", SCIENTIFIC, "Whatever else the objective reports, by its name (docs/objectives.md)."),
            ask(gauge("objective_value"), "{{name}}"),
        ),
    )


def _optimizer() -> tuple[PanelBuilder, ...]:
    return (
        lines(
            frame("Gradient norm", PLAIN, "Before clipping; worry about jumps of a factor of ten.", width=6),
            ask(gauge("gradient_norm"), "norm"),
            low=0,
        ),
        lines(
            frame("Learning rate", SCIENTIFIC, "As the schedule has it; 0 means that nothing is learnt any more.", width=6),
            ask(gauge("learning_rate"), "learning rate"),
            low=0,
        ),
        lines(
            frame(
                "Optimizer steps",
                "suffix:steps/min",
                "Steps taken and steps skipped for not being finite, a minute; any skipped is bad.",
                width=6,
            ),
            ask(f"60 * {rate('optimizer_steps')}", "taken"),
            ask(f"60 * {rate('skipped_steps')}", "skipped"),
            dashed="skipped",
            low=0,
        ),
        lines(
            frame("Images learnt from", IMAGES_PER_S, "Images of consumed groups a second; 0 means that the learner stands.", width=6),
            ask(rate("images_consumed"), "images"),
            low=0,
        ),
    )
