"""Whole small runs under --local whose reward fails: a share of its scores, all of them, or by hanging."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from common.errors import GateError
from common.store.audit import audit
from common.store.run_store import RunStore
from deploy.config import RunConfig
from deploy.session import run_session
from tests.run_fixtures import QUIET, local_options, manifest_facts, small_config

USER_CODE = """
import random
import time

state = {"calls": 0, "mode": "well"}
draw = random.Random(2)  # at P = 4 and K = 4 no 8 groups in a row hold more than 4 with 2 failures: that would stop the run

def judge(image, prompt, metadata):
    state["calls"] += 1
    score = 1.0 + float(image.mean()) / 255  # never 0: a zero in a manifest would be a failure that became a number
    if state["mode"] == "some" and draw.random() < 0.3:
        raise RuntimeError("engine hiccup")
    if state["mode"] == "away" and draw.random() < 0.3:
        raise ConnectionError("connection reset")
    if state["mode"] == "dies" and state["calls"] > 16:
        raise RuntimeError("engine died")
    if state["mode"] == "hangs" and state["calls"] > 5:
        time.sleep(120)
    return score
"""


@pytest.fixture
def reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A user's module in the working directory."""
    name = f"faulty_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(USER_CODE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module(name)


def faulty_config(model: Path, reward: ModuleType, *sets: str) -> RunConfig:
    """P = 2, K = 4, S = 1; the reward judges training alone, and the last version is evaluated on one prompt by another."""
    return small_config(
        model, "tiny-geneval", f"reward.0.name={reward.__name__}:judge", 'evaluation.rewards=["jpeg_incompressibility"]',
        "evaluation.at_start=false", "evaluation.max_prompts=1", "prompts.order=shuffled", "prompts.tag_weights={}", *sets,
    )  # fmt: skip


def failures_of(run_dir: Path) -> tuple[list[float | None], list[str]]:
    """Every score in the manifests, and the reasons of their drops; a null is exactly a sample that does not train."""
    values: list[float | None] = []
    reasons: list[str] = []
    for _, drops, groups in manifest_facts(run_dir):
        reasons += [f"{drop['reason']}: {drop['detail']}" for drop in drops]
        for group in groups:
            (scores,) = [scores for name, scores in group["scores"].items() if name.endswith(":judge")]
            assert group["kept"] == [value is not None for value in scores]
            values += scores
    return values, reasons


def test_with_a_third_of_the_scores_failing_no_zero_trains_groups_drop_with_their_reason_and_the_run_goes_on(
    reward: ModuleType, tiny_sd3_dir: Path, tmp_path: Path
) -> None:
    reward.state["mode"] = "some"
    run_session(faulty_config(tiny_sd3_dir, reward, "learner.groups_per_update=4"), local_options(tmp_path / "run"), QUIET)
    values, reasons = failures_of(tmp_path / "run")
    assert len(values) == 3 * 4 * 4
    assert None in values
    assert all(value is None or 1.0 <= value <= 2.0 for value in values)
    assert reasons
    assert all(reason in {f"too_few_scores: {n} of 4 samples scored, 3 needed" for n in (0, 1, 2)} for reason in reasons)
    assert audit(RunStore(str(tmp_path / "run"))).violations == ()
    records = [json.loads(path.read_text())["rewards"] for path in sorted((tmp_path / "run" / "metrics").glob("update_*.json"))]
    covered = [record[f"{reward.__name__}:judge"]["coverage"] for record in records]
    assert sum(covered) / 3 == pytest.approx(sum(value is not None for value in values) / len(values))


def test_connections_that_fail_a_third_of_the_time_cost_pauses_and_no_sample(
    reward: ModuleType, tiny_sd3_dir: Path, tmp_path: Path
) -> None:
    reward.state["mode"] = "away"
    config = faulty_config(tiny_sd3_dir, reward, "reward.0.retries=12", "schedule.num_updates=1")
    run_session(config, local_options(tmp_path / "run"), QUIET)
    values, reasons = failures_of(tmp_path / "run")
    assert len(values) == 8 and None not in values
    assert reasons == []
    assert reward.state["calls"] > 8


def test_a_reward_that_dies_opens_its_breaker_and_the_run_stops_with_the_cause_its_state_saved_and_goes_on_when_mended(
    reward: ModuleType, tiny_sd3_dir: Path, tmp_path: Path
) -> None:
    reward.state["mode"] = "dies"
    serving = ("reward.0.breaker_failures=2", "reward.0.breaker_pause_s=0.05", "reward.0.breaker_limit_s=0.3", "schedule.max_attempts=100")
    config = faulty_config(tiny_sd3_dir, reward, *serving)
    with pytest.raises(
        GateError, match=r"gate reward: reward \S+:judge: its breaker has been open for \d+ s: RuntimeError: engine died"
    ) as caught:
        run_session(config, local_options(tmp_path / "run"), QUIET)
    assert caught.value.exit_code == 3
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "stopped"
    assert "reward" in status["alerts"][0]
    saved = sorted(path.parent.name for path in (tmp_path / "run" / "learner").glob("*/complete.json"))
    assert int(saved[-1].removeprefix("update_")) == status["version"]
    reward.state["mode"] = "well"
    run_session(config, local_options(tmp_path / "run"), QUIET)
    values, reasons = failures_of(tmp_path / "run")
    assert None not in values and reasons == []  # what could not be scored was scored after all
    assert audit(RunStore(str(tmp_path / "run"))).violations == ()


def test_a_reward_that_hangs_ends_a_local_run_with_the_cause(reward: ModuleType, tiny_sd3_dir: Path, tmp_path: Path) -> None:
    reward.state["mode"] = "hangs"
    with pytest.raises(GateError, match=r"gate reward: .*deadline: scorer \S+ did not answer for 4 images within 2 s"):
        run_session(faulty_config(tiny_sd3_dir, reward, "reward.0.deadline_s=0.5"), local_options(tmp_path / "run"), QUIET)


def test_on_failure_stop_ends_the_run_at_the_first_failed_image(reward: ModuleType, tiny_sd3_dir: Path, tmp_path: Path) -> None:
    reward.state["mode"] = "dies"
    with pytest.raises(GateError, match=r"gate reward: .*image 0 of group 4 could not be scored: RuntimeError: engine died"):
        run_session(faulty_config(tiny_sd3_dir, reward, "reward.0.on_failure=stop"), local_options(tmp_path / "run"), QUIET)
