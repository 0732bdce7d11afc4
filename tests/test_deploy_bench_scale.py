"""The scaling benchmark: what it times, and that its table repeats the measured numbers."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import FlowfleetError
from common.store.manifests import Status
from deploy import bench_scale
from deploy.bench_scale import ScaledRun, measure_stage, render, train_command
from deploy.config import load_config


class SteadyRun(ScaledRun):
    """Publishes a version every time it is looked at; a second passes with each."""

    def __init__(self) -> None:
        self.version, self.asked, self.now = 0, list[int](), 0.0

    def scale(self, workers: int) -> None:
        self.asked.append(workers)

    def wait(self, holds: Callable[[Status], bool], what: str) -> Any:
        while True:
            self.version, self.now = self.version + 1, self.now + 1.0
            status = Status(
                incarnation=1, sequence=1, written_at=0.0, state="running", reason="", host="h", process_id=1, version=self.version,
                manifests=self.version, retired_through=0,
            )  # fmt: skip
            if holds(status):
                return status

    def published(self) -> int:
        return self.version

    def learner_process(self) -> int:
        return 7


def test_a_stage_times_whole_updates_after_the_change_has_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    run = SteadyRun()
    monkeypatch.setattr(bench_scale.time, "monotonic", lambda: run.now)
    stage = measure_stage(run, 2, 5, 16)
    assert run.asked == [2]
    assert (stage.updates, stage.seconds, stage.images_per_second) == (5, 5.0, 16.0)  # 16 images a second
    assert run.version == bench_scale.SETTLE_UPDATES + 5


def test_the_commands_of_both_kinds_are_runs_that_the_config_accepts(tmp_path: Path) -> None:
    for engines, sets in bench_scale.SETS.items():
        items = [*bench_scale.COMMON_SETS, *sets]
        assert load_config(bench_scale.RECIPE, items).images_per_update == (16 if engines == "fake" else 192)
        assert ("--fake" in train_command(engines, tmp_path, items)) == (engines == "fake")


def test_the_table_holds_the_measured_numbers_and_their_ratios() -> None:
    stage = {"updates": 8, "seconds": 4.0, "learner_process": 5}
    report = {
        "command": "python -m deploy.bench_scale", "date": "2026-01-01", "load_before": 0.5, "what": "as shipped",
        "machine": {"commit": "abc", "cpu": "a CPU", "num_cpus": 2},
        "stages": [{**stage, "workers": 1, "images_per_second": 4.0}, {**stage, "workers": 4, "images_per_second": 15.0}],
    }  # fmt: skip
    text = render({"fake": report})
    assert "| 4 | 8 | 4.0 | 15.00 | 3.75 |" in text
    assert "the learner's process is the same in all stages" in text
    report["stages"][1]["learner_process"] = 6
    assert "NOT the same" in render({"fake": report})


def test_a_run_that_ends_is_an_error_and_not_a_figure(tmp_path: Path) -> None:
    run = ScaledRun([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "run", tmp_path / "log")
    with pytest.raises(FlowfleetError, match="exit code 3"):
        run.wait(lambda status: True, "anything")
    run.end()
