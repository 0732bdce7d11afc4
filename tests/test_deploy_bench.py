"""The benchmark: each stage does its role's work, numbers come from the measured seconds, and both files are written."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from rich.console import Console

from common.errors import ConfigError, ModelError
from common.store import paths
from common.store.groups import read_group, read_media
from common.store.run_store import RunStore
from deploy import bench_stages
from deploy.bench import BenchError, StageResult, default_stages, describe_stages, render_markdown, run_bench, run_stage
from deploy.bench_stages import LEASE, BenchSettings, make_work, measure, peak_memory_bytes, prepare

MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def settings(tiny_sd3_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> BenchSettings:
    """A prepared folder with two groups an objective."""
    found = BenchSettings(model=str(tiny_sd3_dir), folder=str(tmp_path_factory.mktemp("bench") / "run"), num_repeats=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_stages, "NUM_GROUPS", 2)
        patch.setattr(bench_stages, "FIRST_NUMBER", {"nft": 0, "grpo": 2, "text": 4})
        prepare(found)
    return found


@pytest.fixture(autouse=True)
def two_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_stages, "NUM_GROUPS", 2)
    monkeypatch.setattr(bench_stages, "FIRST_NUMBER", {"nft": 0, "grpo": 2, "text": 4})


def test_preparing_commits_the_groups_that_the_stages_read(settings: BenchSettings) -> None:
    store = RunStore(settings.folder)
    groups = [read_group(store, paths.group_path(number, LEASE), group_size=16) for number in range(5)]
    assert [group.sampler.kernel for group in groups] == ["ode", "ode", "flow_sde", "flow_sde", "ode"]
    assert groups[2].sampler.window == (0, 1)
    assert groups[0].prompt.id != groups[1].prompt.id
    assert '"' in groups[4].prompt.text  # the OCR rewards read what is quoted
    assert read_media(store, paths.media_path(0, LEASE)).images.shape == (16, 64, 64, 3)


@pytest.mark.parametrize(
    ("stage", "num_images"),
    [("sampling", 16), ("decoding", 16), ("committing", 16), ("learning.nft", 32), ("learning.grpo", 32), ("scoring.jpeg_compressibility", 16),
     ("scoring.geneval_strict", 16), ("scoring.geneval_dense", 16)],
)  # fmt: skip
def test_a_stage_measures_its_work(settings: BenchSettings, stage: str, num_images: int) -> None:
    found: dict[str, Any] = measure(stage, settings)
    assert found["stage"] == stage
    assert found["num_images"] == num_images
    assert len(found["seconds"]) == settings.num_repeats
    assert all(math.isfinite(value) and value > 0 for value in found["seconds"])
    assert 50 < found["peak_mib"] < 100_000


def test_the_learning_stage_trains(settings: BenchSettings) -> None:
    result = make_work("learning.nft", settings).run(0)
    assert result.num_steps == 2  # type: ignore[attr-defined]
    assert result.metrics["grad_norm"] > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("stage", ["rendering", "scoring", "learning.dpo", "sampling.fast"])
def test_an_unknown_stage_is_refused(settings: BenchSettings, stage: str) -> None:
    with pytest.raises(ConfigError, match="unknown"):
        make_work(stage, settings)


def test_a_reward_that_is_not_installed_is_skipped_with_the_reason(settings: BenchSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, options: object) -> None:
        raise ConfigError(f"reward {name}: install flowfleet[ocr]")

    monkeypatch.setattr("reward_servers.registry.make_scorer", refuse)
    assert measure("scoring.ocr_strict", settings) == {
        "stage": "scoring.ocr_strict",
        "skipped": "reward ocr_strict: install flowfleet[ocr]",
    }


def test_peak_memory_sees_an_allocation() -> None:
    before = peak_memory_bytes()
    held = psutil.Process().memory_info().rss
    block = np.ones(before - held + 64 * MEBIBYTE, dtype=np.uint8)
    assert peak_memory_bytes() >= before + 32 * MEBIBYTE  # pages that went back meanwhile
    assert block[-1] == 1


def results() -> list[StageResult]:
    return [
        StageResult(stage="sampling", num_images=16, seconds=(1.0, 2.0, 4.0), peak_mib=700.0),
        StageResult(stage="decoding", num_images=16, seconds=(0.5, 0.5, 0.25), peak_mib=650.0),
        StageResult(stage="scoring.fast", num_images=8, seconds=(0.008, 0.008, 0.016), peak_mib=90.0),
        StageResult(stage="scoring.slow", num_images=8, seconds=(8.0, 8.0, 8.0), peak_mib=300.0),
        StageResult(stage="learning.nft", num_images=32, seconds=(8.0, 8.0, 16.0), peak_mib=900.0),
    ]


def test_rates_are_medians_and_ratios_are_to_the_sampling_of_the_same_run() -> None:
    """By hand: sampling 2 s / 16 images = .125 s; learning 8 / 32 = .25 s."""
    rows = {row["stage"]: row for row in describe_stages(results())}
    assert rows["sampling"]["images_per_second"] == {"median": 8.0, "min": 4.0, "max": 16.0}
    assert {name: row["ratio_to_sampling"] for name, row in rows.items()} == pytest.approx(
        {"sampling": 1.0, "decoding": 0.25, "scoring.fast": 0.008, "scoring.slow": 8.0, "learning.nft": 2.0}
    )


def test_the_page_holds_the_table_and_says_what_it_shows() -> None:
    report = {
        "date": "2026-01-01T00:00:00+00:00", "command": "python -m deploy.bench", "model": "m", "stages": describe_stages(results()),
        "skipped": {"scoring.ocr": "not installed"}, "load_average": {"before": 0.5, "after": 1.0},
        "recipe": {"name": "tiny", "group_size": 16, "num_steps": 6, "guidance_scale": 1.0},
        "machine": {"cpu": "Some CPU", "num_cpus": 2, "memory_bytes": 8 << 30, "commit": "abc", "packages": {"torch": "2.9"}},
    }  # fmt: skip
    page = render_markdown(report)
    assert "| sampling | 8 (4 to 16) | 1 | 700 |" in page
    assert "| scoring.fast | 1000 (500 to 1000) | 0.008 | 90 |" in page
    assert "Some CPU, 2 cores, 8.0 GiB; torch 2.9" in page
    assert "scoring.ocr was not measured: not installed" in page
    assert "Sampling makes 8 images a second on one core." in page
    assert "Scoring an image takes 0.008 (scoring.fast) to 8 (scoring.slow) times as long as sampling it." in page
    assert "Learning an image takes 2 times as long as sampling it (learning.nft)." in page
    assert "The largest process is that of learning.nft, with 900 MiB." in page


def test_every_reward_and_objective_has_a_stage() -> None:
    stages = default_stages()
    assert stages[:3] == ["sampling", "decoding", "committing"]
    assert {"scoring.geneval_strict", "scoring.geneval_dense", "scoring.ocr_flowgrpo", "scoring.jpeg_compressibility"} < set(stages)
    assert {"learning.nft", "learning.grpo"} < set(stages)


def test_a_stage_that_fails_is_named_with_its_reason(tmp_path: Path) -> None:
    settings = BenchSettings(model="m", folder=str(tmp_path), num_repeats=1)
    with pytest.raises(BenchError, match=r"stage rendering ended with code 1 \(common\.errors\.ConfigError: .*'rendering' is unknown"):
        run_stage("rendering", settings, tmp_path)


def test_a_model_that_is_none_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model_index\.json"):
        run_bench(tmp_path / "none", tmp_path / "out", num_repeats=1, stages=["sampling"], console=Console(quiet=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_whole_benchmark_writes_both_files(tiny_sd3_dir: Path, tmp_path: Path) -> None:
    report = run_bench(tiny_sd3_dir, tmp_path, num_repeats=2, stages=default_stages(), console=Console(quiet=True))
    stored = json.loads((tmp_path / "core.json").read_text())
    assert stored == json.loads(json.dumps(report))
    assert not stored["skipped"]
    assert [row["stage"] for row in stored["stages"]] == default_stages()
    page = (tmp_path / "core.md").read_text()
    for row in stored["stages"]:
        numbers = [*row["images_per_second"].values(), row["seconds_per_image"], row["ratio_to_sampling"], row["peak_mib"], *row["seconds"]]
        assert all(math.isfinite(value) and value > 0 for value in numbers)
        assert f"| {row['stage']} |" in page
    by_name = {row["stage"]: row for row in stored["stages"]}
    assert by_name["sampling"]["ratio_to_sampling"] == 1.0
    assert by_name["scoring.jpeg_compressibility"]["peak_mib"] < by_name["sampling"]["peak_mib"]  # a reward server holds no model
    assert {"cpu", "num_cpus", "memory_bytes", "commit", "packages"} <= stored["machine"].keys()
