"""Published curves: an interrupted run gets the rest of its time, and what ends it is one line."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError, Interrupted
from common.store import paths
from common.store.run_store import RunStore
from deploy import results
from tests.report_runs import evaluation, metrics, put_json
from tests.run_fixtures import QUIET, local_options, small_config


def spend(store: RunStore, *, update: int, seconds: float, incarnation: int = 1) -> None:
    """Leave the metrics of an update, `seconds` after the one before it or, the first of its start, with so much work of its own."""
    tables = metrics(update, 10, incarnation) | {"time_unix": 1e9 * incarnation + seconds * update, "seconds": {"learn": seconds}}
    put_json(store, paths.metrics_path(update, incarnation), tables)


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The time limit of every start, which starts nothing."""
    asked: list[Any] = []
    monkeypatch.setattr("deploy.results.run_session", lambda config, options, console: asked.append(config.schedule.time_limit_s))
    return asked


def test_a_start_gets_what_the_earlier_ones_left_of_the_budget(tmp_path: Path, limits: list[Any]) -> None:
    """Two updates of 100 s in one start, one of 50 s in the next: 250 s are spent, whatever lay between the starts."""
    run_dir = tmp_path / "run"
    results.train_for("tiny-geneval", [], run_dir, seconds=600, console=QUIET)
    store = RunStore(str(run_dir))
    spend(store, update=1, seconds=100)
    spend(store, update=2, seconds=100)
    results.train_for("tiny-geneval", [], run_dir, seconds=600, console=QUIET)
    spend(store, update=3, seconds=50, incarnation=2)
    results.train_for("tiny-geneval", [], run_dir, seconds=600, console=QUIET)
    assert limits == [600, 400, 350]


@pytest.mark.parametrize("budget_s", [200, 150])
@pytest.mark.parametrize(("evaluated", "expected"), [(2, []), (1, [results.SHORTEST_S])], ids=["evaluated", "its last version is not"])
def test_a_run_that_has_spent_its_budget_starts_again_only_to_evaluate_its_last_version(
    budget_s: float, evaluated: int, expected: list[float], tmp_path: Path, limits: list[Any]
) -> None:
    store = RunStore(str(tmp_path / "run"))
    spend(store, update=1, seconds=100)
    spend(store, update=2, seconds=100)
    evaluation(store, evaluated, {"colors": [1.0]})
    results.train_for("tiny-geneval", [], tmp_path / "run", seconds=budget_s, console=QUIET)
    assert limits == expected


def test_an_interrupted_curve_goes_on_and_its_raw_file_says_how_many_starts_it_took(
    tiny_sd3_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run has three real updates by a first start; the second one finds no time left and writes the file at once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "raw")
    run_dir = tmp_path / "runs" / "results" / "small-s1"
    results.run_session(small_config(tiny_sd3_dir, "tiny-geneval", "run.seed=1"), local_options(run_dir), QUIET)
    monkeypatch.setattr(results, "run_session", None)  # a second start would fail
    results.run("tiny-geneval", seeds="1", minutes=1e-4, sets=None, name="small")
    facts = json.loads((tmp_path / "raw" / "small-s1.json").read_text())
    assert (facts["starts"], facts["updates"], facts["audit"]) == (1, 3, "clean")
    assert facts["command"] == "python -m deploy.results run tiny-geneval --seeds 1 --minutes 0.0001"


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # of runpy: it runs a module that tests import, too
@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (Interrupted("SIGTERM came"), 130, "stopped, the state is saved: SIGTERM came\n"),
        (ConfigError("config: [x] is wrong"), 2, "error: config: [x] is wrong\n"),
    ],
)
def test_what_ends_a_curve_is_one_line_and_its_exit_code(
    error: Exception, code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("deploy.session.run_session", refuse)
    monkeypatch.setattr("sys.argv", ["results", "run", "tiny-geneval", "--name", "no-such-raw-file"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("deploy.results", run_name="__main__")
    assert ended.value.code == code
    assert capsys.readouterr().err == words
