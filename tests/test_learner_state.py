"""LearnerState: bitwise resume (O15), complete or not at all, thinned, refused when damaged."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.errors import CorruptFile
from deploy.config import PROJECT
from learner.objectives.grpo import GrpoConfig
from learner.objectives.nft import NftConfig
from learner.state import StateArchive
from tests.learner_fakes import MemoryFiles
from tests.resume_check import check_resume
from tests.test_learner_update import OBJECTIVES, batch_with, learner_of


@OBJECTIVES
def test_six_updates_equal_three_saved_loaded_elsewhere_and_three_more(objective: Any) -> None:
    check_resume(lambda: learner_of(objective=objective, optimizer_steps=2, warmup_steps=5), batch_with, updates=6, cut=3)


def test_states_are_thinned_and_partial_folders_do_not_count() -> None:
    files = MemoryFiles()
    archive = StateArchive(files, states_kept=2, writer_id="w")
    learner = learner_of()
    files.create_exclusive("learner/update_000001/state.dead.safetensors", b"half", writer_id="dead")
    files.create_exclusive("learner/update_000009/state.dead.safetensors", b"half", writer_id="dead")
    for update in (2, 3, 4):
        learner.version = update
        archive.save(learner)
    assert archive.complete_updates() == [3, 4]
    assert {path.split("/")[1] for path in files.list("learner")} == {"update_000003", "update_000004", "update_000009"}
    assert list(files.content)[-1].endswith("complete.json")  # written last
    archive.save(learner)  # a replay of equal bytes is no difference
    assert archive.num_differences == 0
    learner.live = {name: tensor + 1 for name, tensor in learner.live.items()}
    before = dict(files.content)
    archive.save(learner)
    assert archive.num_differences == 1
    assert all(files.content[path] == content for path, content in before.items())


def test_a_damaged_state_is_refused_with_its_remedy() -> None:
    files = MemoryFiles()
    archive = StateArchive(files, states_kept=2, writer_id="w")
    archive.save(learner_of())
    path = next(path for path in files.content if path.endswith(".safetensors"))
    files.content[path] = files.content[path][:-1] + b"!"
    with pytest.raises(CorruptFile, match="remove that update's folder"):
        archive.load(learner_of(), 0)
    files.content["learner/update_000000/complete.json"] = b"{"
    with pytest.raises(CorruptFile, match="cannot be read"):
        archive.load(learner_of(), 0)


def test_a_state_of_another_objective_is_refused() -> None:
    files = MemoryFiles()
    archive = StateArchive(files, states_kept=2, writer_id="w")
    archive.save(learner_of(objective=NftConfig()))
    with pytest.raises(CorruptFile, match="behavior"):
        archive.load(learner_of(objective=GrpoConfig()), 0)


def test_twenty_kills_during_the_saving_leave_only_whole_states(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.state_saver_child", str(tmp_path / "run"), "20", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr  # every complete state was loaded after every kill
    told = json.loads(done.stdout)
    assert len(told["newest"]) == 21
    assert sorted(set(told["newest"])) == told["newest"]  # each process went on from the newest
    assert told["num_partial"] > 0  # the kills did come in the middle
