"""kill -9 just before and just after every kind of commit: the same command goes on, and the run ends bit-equal to an untouched one."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.store.audit import audit
from common.store.run_store import RunStore
from deploy.config import PROJECT
from deploy.session import run_session
from tests.run_fixtures import QUIET, history_digests, local_options, published_digests, small_config

SYNC = ("schedule.max_staleness=0", "evaluation.at_start=false")
BOUNDARIES = {
    "claim": (r"^config\.", 1), "group": (r"\.group\.arrow$", 3), "media": (r"^groups/.*\.media\.arrow$", 3),
    "scores": (r"^scores/", 5), "manifest": (r"^manifests/", 2), "state": (r"^learner/.*\.safetensors$", 3),
    "state_complete": (r"^learner/.*complete\.json$", 3), "policy": (r"^policy/", 2), "history": (r"^history/", 2),
    "metrics": (r"^metrics/", 2), "sheet": (r"^eval/.*\.media\.arrow$", 1), "sheet_scores": (r"^eval/.*jpeg.*\.arrow$", 1),
}  # fmt: skip
QUICK = [("grpo", "manifest", "after"), ("nft", "state_complete", "before")]
ALL = [("nft", name, moment) for name in BOUNDARIES for moment in ("before", "after")] + [
    ("grpo", name, moment) for name in ("manifest", "state_complete", "policy") for moment in ("before", "after")
]
RECIPES = {"nft": "tiny-geneval", "grpo": "tiny-geneval-grpo"}


@pytest.fixture(scope="module")
def untouched(tiny_sd3_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each objective that nobody killed."""
    folder = tmp_path_factory.mktemp("untouched")
    for objective, recipe in RECIPES.items():
        run_session(small_config(tiny_sd3_dir, recipe, *SYNC), local_options(folder / objective), QUIET)
    return {objective: folder / objective for objective in RECIPES}


def kill_and_resume(objective: str, boundary: str, moment: str, model: Path, run_dir: Path, untouched: Path) -> None:
    """Run to the kill, run again, compare."""
    pattern, nth = BOUNDARIES[boundary]
    arguments = [str(model), str(run_dir), RECIPES[objective], pattern, moment, str(nth)]
    killed = subprocess.run(
        [sys.executable, "-m", "tests.boundary_child", *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=300, check=False
    )
    assert killed.returncode == -signal.SIGKILL, f"no {boundary} was the {nth}th: {killed.stdout}{killed.stderr}"
    run_session(small_config(model, RECIPES[objective], *SYNC), local_options(run_dir), QUIET)
    assert audit(RunStore(str(run_dir))).violations == ()
    assert published_digests(run_dir)[3] == published_digests(untouched)[3]
    assert history_digests(run_dir) == history_digests(untouched)
    assert [path.name for path in run_dir.rglob("*.tmp") if "learner" in path.parts] == []  # a half-written state is listed nowhere


@pytest.mark.parametrize(("objective", "boundary", "moment"), QUICK)
def test_a_kill_at_a_commit_changes_no_bit(
    objective: str, boundary: str, moment: str, tiny_sd3_dir: Path, tmp_path: Path, untouched: dict[str, Path]
) -> None:
    kill_and_resume(objective, boundary, moment, tiny_sd3_dir, tmp_path / "run", untouched[objective])


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "boundary", "moment"), [case for case in ALL if case not in QUICK])
def test_a_kill_at_any_commit_changes_no_bit(
    objective: str, boundary: str, moment: str, tiny_sd3_dir: Path, tmp_path: Path, untouched: dict[str, Path]
) -> None:
    kill_and_resume(objective, boundary, moment, tiny_sd3_dir, tmp_path / "run", untouched[objective])
