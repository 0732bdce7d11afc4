"""What a start refuses to go on from: everything that an earlier one made counts, not manifests alone."""

from pathlib import Path

import pytest

from common.config import config_digest
from common.errors import ConfigError
from common.store import paths
from common.store.claim import claim_run
from common.store.run_store import RunStore
from deploy.config import RunConfig, load_config
from deploy.session import check_resume
from tests.run_fixtures import local_options

MADE = {
    "an image": paths.group_path(0, "t0-ab"), "a state": paths.learner_complete_path(0), "a version": paths.adapter_path(1, 0),
    "a manifest": paths.manifest_path(1),
}  # fmt: skip


def config_with(*sets: str) -> RunConfig:
    return load_config("tiny-geneval", list(sets))


def begun(run_dir: Path) -> RunStore:
    """A run directory that one start has claimed."""
    store, config = RunStore(str(run_dir)), config_with("run.seed=1")
    for _ in claim_run(store, config.model_dump(mode="json"), config_digest=config_digest(config)):
        pass
    return store


@pytest.mark.parametrize("path", MADE.values(), ids=MADE.keys())
def test_a_changed_config_is_refused_as_soon_as_anything_was_made_by_the_other(path: str, tmp_path: Path) -> None:
    store = begun(tmp_path)
    store.create_exclusive(path, b"made", writer_id="w")
    changed = config_with("run.seed=2", "learner.learning_rate=1e-5")
    with pytest.raises(ConfigError, match=r"run.seed: 1 -> 2.*--allow-change learner.learning_rate --allow-change run.seed"):
        check_resume(store, changed, local_options(tmp_path))
    check_resume(store, changed, local_options(tmp_path, allow_changes=("run.seed", "learner.learning_rate")))
    check_resume(store, config_with("run.seed=1"), local_options(tmp_path))
    with pytest.raises(ConfigError, match="holds a run already and --resume never was given"):
        check_resume(store, config_with("run.seed=1"), local_options(tmp_path, resume=False))


def test_a_start_that_made_nothing_binds_nobody(tmp_path: Path) -> None:
    store = begun(tmp_path)
    for resume in (True, False):
        check_resume(store, config_with("run.seed=2"), local_options(tmp_path, resume=resume))
