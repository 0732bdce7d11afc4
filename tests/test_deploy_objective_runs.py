"""The objectives' comparison: levels, medians, ratios and the table, by hand."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from common.errors import Interrupted, UserError
from common.store.run_store import RunStore
from deploy import objective_runs
from deploy.objective_runs import (
    REFERENCE,
    ComparisonPlan,
    Entry,
    Reached,
    Sooner,
    best_of,
    best_trial,
    curves,
    end_of,
    median_reached,
    outside,
    reached,
    speedup,
    table_lines,
    trial_score,
)
from tests.test_deploy_results import spend


def facts(*points: tuple[float, float], train: tuple[float | None, ...] = ()) -> dict[str, Any]:
    """A raw file whose frozen evaluations stand at (minutes, mean): 100 images and 300 forwards a minute."""
    return {
        "evaluations": [
            {"version": k, "seconds": 60.0 * at, "images": 100.0 * at, "forwards": 300.0 * at, "rewards": {"geneval_strict": {"mean": mean}}}
            for k, (at, mean) in enumerate(points)
        ],
        "train": [{"update": k + 1, "rewards": {"geneval_strict": mean}} for k, mean in enumerate(train)],
        "settings": ["learner.learning_rate=0.001", "run.seed=1"], "sensors": {"diversity": 0.25, "dark_share": 0.4, "edge_density": 2.0},
        "bands": {"diversity": {"low": 0.2, "high": None}, "dark_share": {"low": 0.0, "high": 0.3}}, "audit": "clean",
    }  # fmt: skip


def test_a_level_is_reached_at_the_first_evaluation_that_stands_at_it_though_a_later_one_falls() -> None:
    run = facts((0, 0.68), (2, 0.79), (4, 0.82), (6, 0.75))
    assert reached(run, 0.80) == Reached(seconds=240, images=400, forwards=1200)
    assert reached(run, 0.82) == Reached(seconds=240, images=400, forwards=1200)
    assert reached(run, 0.90) is None
    assert best_of(run) == 0.82
    assert end_of(run) == pytest.approx((0.79 + 0.82 + 0.75) / 3)


def test_the_median_run_counts_one_that_never_arrives_as_infinite_and_most_must_arrive() -> None:
    early, late, never = facts((0, 0.6), (2, 0.85)), facts((0, 0.6), (6, 0.85)), facts((0, 0.6), (9, 0.7))
    assert median_reached([early, late, never], 0.8) == Reached(seconds=360, images=600, forwards=1800)
    assert median_reached([early, never, never], 0.8) is None
    assert median_reached([early, never], 0.8) is None  # half is not most
    assert median_reached([], 0.8) is None


def test_the_ratio_is_taken_at_the_highest_level_that_both_reach() -> None:
    slow = [facts((0, 0.6), (5, 0.70), (10, 0.76))]
    fast = [facts((0, 0.6), (2, 0.77), (10, 0.95))]
    assert speedup(fast, slow) == Sooner(level=0.76, seconds=pytest.approx(5.0), images=pytest.approx(5.0), forwards=pytest.approx(5.0))
    assert speedup(slow, fast) == Sooner(level=0.76, seconds=pytest.approx(0.2), images=pytest.approx(0.2), forwards=pytest.approx(0.2))
    slower = facts((0, 0.6), (10, 0.73))  # of two seeds the level is one that both reach
    assert speedup(fast, [*slow, slower]) == Sooner(
        level=0.73, seconds=pytest.approx(5.0), images=pytest.approx(5.0), forwards=pytest.approx(5.0)
    )
    assert speedup([facts((0, 0.6), (5, 0.5))], slow) is None  # it never rose above the base, where both begin


def test_a_sensor_is_outside_where_its_mean_at_the_end_leaves_a_band_that_exists() -> None:
    run = facts((0, 0.6))
    assert outside(run) == ["dark_share"]  # diversity .25 is above .2 and has no upper end; edge_density has no band
    assert outside(run | {"sensors": {"diversity": 0.19, "dark_share": 0.3}}) == ["diversity"]


def test_trials_are_chosen_by_the_last_third_of_their_training_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective_runs, "RAW", tmp_path)
    high_frozen = facts((0, 0.6), (5, 0.99), train=(0.9, 0.9, 0.9, 0.9, 0.2, 0.2))
    high_end = facts((0, 0.6), (5, 0.61), train=(0.1, 0.1, 0.1, 0.1, 0.5, None, 0.7))
    assert trial_score(high_frozen) == pytest.approx(0.2)
    assert trial_score(high_end) == pytest.approx(0.6)
    with pytest.raises(UserError, match="trials come before seeds"):
        best_trial("r", ({}, {}))
    for number, raw in enumerate((high_frozen, high_end)):
        (tmp_path / f"r-t{number}.json").write_text(json.dumps(raw))
    assert best_trial("r", ({}, {})) == 1
    assert best_trial("alone", ({},)) == 0


def test_the_table_says_what_was_not_reached_and_what_was_not_measured() -> None:
    plan = ComparisonPlan(
        trial_minutes=1, run_minutes=1, evaluate_every=1, objective=tuple(Entry(recipe=name) for name in (REFERENCE, "nft", "absent"))
    )
    runs = {REFERENCE: [facts((0, 0.6), (5, 0.70), (10, 0.76))], "nft": [facts((0, 0.6), (2, 0.82))], "absent": []}
    lines = table_lines(plan, runs)
    assert len({line.count("|") for line in lines}) == 1
    reference, nft, absent = lines[2:]
    assert reference.count("not reached") == 2 and "0.760" in reference
    assert (
        "0.820: 2.0 / 200 / 600 | 0.710 | 2.0 / 200 / 600 | not reached | 5.0x / 5.0x / 5.0x to 0.760 | 0.250 | dark_share | clean" in nft
    )
    assert "learner.learning_rate=0.001" in nft
    assert "run.seed" not in nft
    assert "not measured" in absent


def test_the_plot_has_a_panel_a_family_with_the_reference_in_both() -> None:
    run = facts((0, 0.6), (5, 0.70))
    runs = {REFERENCE: [run, run], "tiny-geneval-guard": [run], "tiny-geneval-nft": [run], "tiny-geneval-awm": []}
    steps, latents = curves(runs).axes
    legends = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in (steps, latents)]
    assert legends == [["grpo-full", "guard"], ["grpo-full", "nft"]]
    assert [len(axes.lines) for axes in (steps, latents)] == [3, 3]
    assert steps.lines[0].get_xydata().tolist() == [[0, 0.6], [5, 0.70]]


def test_a_comparisons_interrupted_run_goes_on_with_the_time_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(objective_runs, "RAW", tmp_path / "raw")
    monkeypatch.setattr("deploy.results.run_session", lambda config, options, console: asked.append(config.schedule.time_limit_s))
    store = RunStore(str(tmp_path / "runs" / "objectives" / "tiny-geneval-nft-s1"))
    spend(store, update=1, seconds=100.0)
    plan = tmp_path / "plan.toml"
    plan.write_text(
        'trial_minutes = 1\nrun_minutes = 2\nevaluate_every = 1\n[[objective]]\nrecipe = "tiny-geneval-nft"\n', encoding="utf-8"
    )
    monkeypatch.setattr(objective_runs, "comparison_facts", lambda *given: {"command": given[3]})
    objective_runs.run(plan, None)
    assert asked == [20.0]
    command = json.loads((tmp_path / "raw" / "tiny-geneval-nft-s1.json").read_text())["command"]
    assert "--set schedule.time_limit_s=120 " in command  # of the whole run, as who repeats it would give it


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # of runpy: it runs a module that tests import, too
@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            Interrupted("SIGTERM came; the same command goes on"),
            130,
            "stopped, the state is saved: SIGTERM came; the same command goes on\n",
        ),
        (UserError("prompts: no such file"), 2, "error: prompts: no such file\n"),
    ],
)
def test_what_ends_a_comparison_is_one_line_and_its_exit_code(
    error: Exception, code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("deploy.results.run_session", refuse)
    plan = tmp_path / "plan.toml"
    recipe = "tiny-geneval-tempflow"  # the one objective; its raw file must not be there, or nothing would be run
    plan.write_text(
        f'trial_minutes = 1\nrun_minutes = 2\nevaluate_every = 1\n[[objective]]\nrecipe = "{recipe}"\nseeds = [987]\n', encoding="utf-8"
    )
    monkeypatch.setattr("sys.argv", ["objective_runs", "run", "--plan", str(plan)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("deploy.objective_runs", run_name="__main__")
    assert ended.value.code == code
    assert capsys.readouterr().err == words
