"""The Fleet dashboard: which slots there are, how fast each samples, which weights it holds, and who is silent, refused or crashing."""

from common.store.config import ScheduleConfig
from deploy.monitoring.board import Board, Section
from deploy.monitoring.expressions import RANGE, gauge, increase, or_zero, rate, rises
from deploy.monitoring.panels import (
    COUNT,
    GREEN,
    IMAGES_PER_S,
    ORANGE,
    PLAIN,
    RED,
    SECONDS,
    SHARE,
    SLOTS,
    PanelBuilder,
    above,
    ask,
    frame,
    lines,
    now,
    number,
    timeline,
)

RUNNING = 'state="running"'
SILENCE_S = ScheduleConfig().lease_timeout_s  # by default; a slot that is silent for longer loses its lease


def board() -> Board:
    """The dashboard."""
    return Board(
        slug="fleet",
        title="Fleet",
        text="Slots, their speed, their weights, and who is silent, refused or crashing.",
        sections=(
            Section(title="Now", panels=_summary()),
            Section(title="Sampling", panels=_sampling()),
            Section(title="Slots", panels=_slots()),
            Section(title="Weights", panels=_weights()),
        ),
    )


def _summary() -> tuple[PanelBuilder, ...]:
    return (
        number(
            frame("Images a second", IMAGES_PER_S, "Sampled by all slots, mean over the window.", width=6, height=4),
            now(rate("rollout_images")),
        ),
        number(
            frame("Running slots", COUNT, "By role; fewer than wanted for long means that processes do not start.", width=6, height=4),
            now(or_zero(f"sum by (role) ({gauge('slots', RUNNING)})", "role"), "{{role}}"),
        ),
        number(
            frame(
                "Refused slots",
                COUNT,
                "Slots that get no lease since their weights did not arrive as published; any is bad.",
                width=4,
                height=4,
            ),
            now(or_zero(f"sum({gauge('slot_refused')})")),
            steps=above((1, RED)),
        ),
        number(
            frame(
                "Receipt mismatches",
                COUNT,
                "Loads in the time shown whose receipt differed from the publication; any is bad.",
                width=4,
                height=4,
            ),
            now(increase("receipt_mismatches", over=RANGE)),
            steps=above((0.5, RED)),
        ),
        number(
            frame("Crashes", COUNT, "Processes that ended unasked in the time shown, by role; a few are survived.", width=4, height=4),
            now(rises("slot_crashes", "role", over=RANGE), "{{role}}"),
            steps=above((0.5, ORANGE), (5, RED)),
        ),
    )


def _sampling() -> tuple[PanelBuilder, ...]:
    return (
        lines(
            frame("Images a second, all slots", IMAGES_PER_S, "Mean over the window; training and evaluation images.", width=12),
            ask(rate("rollout_images"), "all"),
            low=0,
        ),
        lines(
            frame(
                "Images a second, by slot",
                IMAGES_PER_S,
                "Mean over the window; one slot far below the others has a slow or shared device.",
                width=12,
            ),
            ask(rate("rollout_images", "slot"), "{{slot}}"),
            low=0,
        ),
    )


def _slots() -> tuple[PanelBuilder, ...]:
    return (
        lines(
            frame(
                "Slots by role and state",
                SLOTS,
                "What is there, and the size that each pool is to have (dashed); "
                "starting or resting for long means that something does not start.",
                width=12,
            ),
            ask(gauge("slots"), "{{role}} {{state}}"),
            ask(gauge("slots_wanted"), "{{pool}}: wanted"),
            dashed=": wanted",
            low=0,
        ),
        lines(
            frame(
                "Share of time spent waiting, by slot",
                SHARE,
                "Of the last minute, for others; slots that always wait could be fewer.",
                width=12,
            ),
            ask(gauge("slot_idle_ratio"), "{{slot}}"),
            low=0,
            high=1,
        ),
        lines(
            frame(
                "Silence",
                SECONDS,
                f"Seconds since a slot was heard; past {SILENCE_S:g} s (schedule.lease_timeout_s by default) it loses its lease.",
                width=12,
            ),
            ask(gauge("slot_silent_seconds"), "{{slot}}"),
            steps=above((SILENCE_S, RED)),
            low=0,
        ),
        lines(
            frame(
                "Crashes by role",
                COUNT,
                "Processes that ended unasked, over the window; a slot that crashes again and again rests longer each time.",
                width=12,
            ),
            ask(rises("slot_crashes", "role"), "{{role}}"),
            style="bars",
            low=0,
        ),
    )


def _weights() -> tuple[PanelBuilder, ...]:
    return (
        lines(
            frame(
                "Version by slot",
                PLAIN,
                "Policy version that each slot bound last, beside the newest (dashed); a slot far below samples stale groups.",
                width=12,
            ),
            ask(gauge("slot_policy_version"), "{{slot}}"),
            ask(gauge("policy_version"), "newest published"),
            dashed="newest published",
        ),
        timeline(
            frame(
                "Refused",
                PLAIN,
                "Slots whose weights did not arrive as published get no lease; look into their logs and restart them.",
                width=6,
            ),
            ask(gauge("slot_refused"), "{{slot}}"),
            texts={"0": ("serves", GREEN), "1": ("refused", RED)},
        ),
        lines(
            frame("Receipt mismatches", COUNT, "Load receipts that differed from the publication, over the window; any is bad.", width=6),
            ask(increase("receipt_mismatches"), "mismatches"),
            style="bars",
            low=0,
        ),
    )
