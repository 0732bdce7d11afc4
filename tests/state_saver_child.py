"""Processes that save LearnerStates without a pause, each killed (-9) at a random moment: `python -m tests.state_saver_child DIR KILLS SEED`.

After every kill all complete states are loaded. Prints JSON: the newest update after each kill, and how many kills left a partial folder.
"""

import json
import os
import random
import signal
import sys
import time

from common.store.run_store import RunStore
from learner.config import LearnerConfig
from learner.objectives.grpo import GrpoConfig
from learner.state import StateArchive
from learner.update import Learner, make_learner
from tests.learner_policies import linear_policy

STATES_KEPT = 2


def fresh_learner() -> Learner:
    """A learner that has done nothing."""
    return make_learner(linear_policy(500), LearnerConfig(groups_per_update=2, objective=GrpoConfig(clip_range=0.1)), {"r": 1.0}, 3)


def saver(url: str) -> None:
    """Go on from the newest state and save one after another."""
    archive, learner = StateArchive(RunStore(url), states_kept=STATES_KEPT, writer_id=f"pid{os.getpid()}"), fresh_learner()
    complete = archive.complete_updates()
    if complete:
        archive.load(learner, complete[-1])
    while True:
        learner.version += 1
        archive.save(learner)


def check(url: str) -> tuple[int, bool]:
    """Load every state that is listed as complete; return the newest and whether a partial folder lies beside them."""
    store = RunStore(url)
    archive = StateArchive(store, states_kept=STATES_KEPT, writer_id="check")
    complete = archive.complete_updates()
    for update in complete:
        learner = fresh_learner()
        archive.load(learner, update)
        assert learner.version == update
    folders = {path.split("/")[1] for path in store.list("learner")}
    return complete[-1], len(folders) > len(complete)


def main(url: str, num_kills: int, seed: int) -> None:
    """Kill, check, and let the next one go on."""
    moments, newest, num_partial = random.Random(seed), [0], 0
    for _ in range(num_kills):
        process = os.fork()
        if process == 0:
            saver(url)
        archive = StateArchive(RunStore(url), states_kept=STATES_KEPT, writer_id="watch")
        while max(archive.complete_updates(), default=0) <= newest[-1]:
            time.sleep(0.002)
        time.sleep(moments.uniform(0.0, 0.05))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        update, is_partial = check(url)
        newest.append(update)
        num_partial += is_partial
    sys.stdout.write(json.dumps({"newest": newest, "num_partial": num_partial}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
