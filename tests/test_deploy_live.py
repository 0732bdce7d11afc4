"""The live line says what matters, and names the role that waits."""

import io

import pytest
from rich.console import Console

from deploy.demo import verdict
from deploy.live import LiveLine, format_line, waiting_sentence
from deploy.report.compare import TableRow


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ({"learner": 0.63, "rollout": 0.05, "reward": 0.9}, "learner waits 63% for rollouts: add rollout workers"),
        ({"learner": 0.5, "rollout": 0.6, "reward": 0.0}, "learner waits 50% for scores: add reward servers"),
        ({"learner": 0.1, "rollout": 0.4, "reward": 0.9}, "rollout waits 40% for the learner"),
        ({"learner": 0.1, "rollout": 0.1, "reward": 0.9}, "balanced"),
        ({}, "starting"),
    ],
)
def test_the_sentence_names_the_role_that_waits_and_the_remedy(shares: dict[str, float], words: str) -> None:
    assert words in waiting_sentence(shares)


def test_the_line_shows_figures_that_exist_and_leaves_out_others() -> None:
    metrics = {"reward": 0.5, "flat_group_share": 0.25, "kl": 1e-3, "clip_fraction": 0.02, "images_per_s": 12.3, "staleness": 1.0}
    line = format_line({"update": 10, "first_update": 0, "metrics": metrics, "waiting": {"learner": 0.0}}, 40, 60.0)
    for words in ("update 10/40", "reward 0.500", "flat 25%", "KL 1.00e-03", "clip 2.0%", "images/s 12.3", "staleness 1.0", "ETA 3m00s"):
        assert words in line
    assert "KL" not in format_line({"update": 0, "metrics": {}, "waiting": {}}, 40, 1.0)


def test_without_a_terminal_plain_lines_are_written() -> None:
    sink = io.StringIO()
    with LiveLine(console=Console(file=sink, force_terminal=False, width=200), num_updates=5) as live:
        live.update({"update": 1, "metrics": {}, "waiting": {}})
        live.update({"update": 1, "metrics": {}, "waiting": {}})
    assert sink.getvalue().count("update 1/5") == 1  # the same update is not said twice
    assert "\x1b" not in sink.getvalue()


def test_the_demo_says_whether_the_frozen_evaluation_rose() -> None:
    row = TableRow(reward="geneval_strict", task="mean", n=240, before=0.5, after=0.7, difference=0.2, low=0.1, high=0.3, is_mean=True)
    assert verdict(row) == "frozen geneval_strict rose: 0.500 -> 0.700 (+0.200, 95 % +0.100 .. +0.300)"
