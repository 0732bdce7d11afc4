"""The Rewards dashboard: what each reward says of the images, and how well its servers do."""

from deploy.monitoring.board import Board, Section
from deploy.monitoring.expressions import gauge, quantile, rate, rises
from deploy.monitoring.panels import (
    COUNT,
    GREEN,
    IMAGES_PER_S,
    ORANGE,
    PLAIN,
    RED,
    SECONDS,
    SHARE,
    PanelBuilder,
    Step,
    above,
    ask,
    frame,
    lines,
    timeline,
)

LEAST_COVERAGE = 0.9
QUANTILES = (0.5, 0.95, 0.99)


def board() -> Board:
    """The dashboard."""
    return Board(
        slug="rewards",
        title="Rewards",
        text="What each reward says, how much of what it is asked it scores, and how fast.",
        sections=(
            Section(title="Scores", panels=_scores()),
            Section(title="Failures", panels=_failures()),
            Section(title="Service", panels=_service()),
        ),
    )


def _scores() -> tuple[PanelBuilder, ...]:
    return (
        lines(
            frame("Mean", PLAIN, "Mean raw score of the newest update's images; a sudden jump is more often a hack than a success."),
            ask(gauge("reward_mean"), "{{reward}}"),
        ),
        lines(
            frame(
                "Spread inside groups",
                PLAIN,
                "Standard deviation inside groups; at 0 the reward tells the images of a prompt no more apart.",
            ),
            ask(gauge("reward_group_std"), "{{reward}}"),
            low=0,
        ),
        lines(
            frame("Flat groups", SHARE, "Share of groups in which this reward does not differ; above half it hardly trains."),
            ask(gauge("reward_flat_ratio"), "{{reward}}"),
            steps=above((0.5, ORANGE)),
            low=0,
            high=1,
        ),
    )


def _failures() -> tuple[PanelBuilder, ...]:
    steps = (Step(value=None, color=RED), Step(value=LEAST_COVERAGE, color=GREEN))
    return (
        lines(
            frame(
                "Coverage",
                SHARE,
                "Scored over applicable images of the newest groups; below the line the mean is of what was easy to score.",
            ),
            ask(gauge("reward_coverage_ratio"), "{{reward}}"),
            steps=steps,
            low=0,
            high=1,
        ),
        lines(
            frame(
                "Images without a score, by reason",
                COUNT,
                "Over the window, by the error's first words; a failure is never a number, so these teach nothing.",
            ),
            ask(rises("reward_null_scores", "reward", "reason"), "{{reward}}: {{reason}}"),
            style="bars",
            low=0,
        ),
        timeline(
            frame("Pools", PLAIN, "Whether a reward's servers score; while a train reward's pool is down no new group is admitted."),
            ask(gauge("reward_pool_down"), "{{reward}}"),
            texts={"0": ("scores", GREEN), "1": ("down", RED)},
        ),
    )


def _service() -> tuple[PanelBuilder, ...]:
    latencies = [ask(quantile(share, "reward_latency_seconds", "reward"), f"{{{{reward}}}} p{100 * share:g}") for share in QUANTILES]
    batch = f"{rate('reward_images', 'reward')} / {rate('reward_calls', 'reward')}"
    return (
        lines(
            frame(
                "Latency of an image",
                SECONDS,
                "Quantiles of the seconds that an image's scoring took, over the window; "
                "p99 far above p50 means retries or a stuck server.",
                width=12,
            ),
            *latencies,
            low=0,
        ),
        lines(
            frame(
                "Images asked",
                IMAGES_PER_S,
                "Images that each reward was asked to score, a second; it should follow the rollouts.",
                width=12,
            ),
            ask(rate("reward_images", "reward"), "{{reward}}"),
            low=0,
        ),
        lines(
            frame("Mean batch", "suffix:images", "Images a call of the scorer; small ones waste a GPU.", width=12),
            ask(batch, "{{reward}}"),
            low=0,
        ),
        lines(
            frame(
                "Backlog", "suffix:groups", "Committed groups that the reward has not scored; one that grows wants more servers.", width=12
            ),
            ask(gauge("reward_backlog_groups"), "{{reward}}"),
            low=0,
        ),
    )
