"""A cluster of three Ray nodes on this host, with GPUs that exist on paper: who sits where, and a node that goes away in mid-run."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.state import actors
from ray.cluster_utils import Cluster

from common.config import config_digest
from common.store.audit import audit
from common.store.claim import claim_run
from common.store.control import ControlRequest, write_request
from common.store.ending import EndKind
from common.store.run_store import RunStore
from deploy.compose import RunParts, compose
from deploy.config import load_config
from deploy.fakes import parse_fakes
from deploy.gates import check_fake_config
from deploy.ray_run import run_on_ray
from tests.fleet_runs import FAKES, PATIENCE_S, SETS

pytestmark = pytest.mark.slow

Nodes = dict[str, Any]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """The head without a GPU, large and small with some; small alone offers the resource `rollout`."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0})
    found = {"cluster": cluster, "head": cluster.head_node}
    found["large"] = cluster.add_node(num_cpus=4, num_gpus=2)
    found["small"] = cluster.add_node(num_cpus=2, num_gpus=1, resources={"rollout": 1})
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    yield found
    ray.shutdown()
    cluster.shutdown()


def parts_of(run_dir: Path | str, *sets: str) -> RunParts:
    """A run of fake engines, claimed."""
    config = load_config("tiny-geneval", [*SETS, *sets])
    claiming = claim_run(RunStore(str(run_dir)), config.model_dump(mode="json"), config_digest=config_digest(config))
    with pytest.raises(StopIteration) as claimed:
        next(claiming)
    return compose(config, check_fake_config(config), str(run_dir), claimed.value.value.incarnation, parse_fakes(FAKES))


def seats(class_name: str) -> list[str]:
    """Node ids of the living actors of a class."""
    return [a["Address"]["NodeID"] for a in actors().values() if a["ActorClassName"] == class_name and a["State"] == "ALIVE"]


def stop(store: RunStore) -> None:
    """`flowfleet stop`."""
    write_request(store, ControlRequest(kind="stop", incarnation=1, asked_at="", writer_id="w"))


class Script:
    """What a test does while the driver runs: called with every summary, it goes one step on when the step's condition holds."""

    def __init__(self, store: RunStore, nodes: Nodes) -> None:
        self._store, self._nodes = store, nodes
        self._deadline = time.monotonic() + 2 * PATIENCE_S
        self._removed_at: int | None = None
        self._is_stopped = False
        self.seats: dict[str, list[str]] = {}

    def __call__(self, summary: dict[str, Any]) -> None:
        assert time.monotonic() < self._deadline, summary
        version = summary["version"] or 0
        if self._removed_at is None:
            if version >= 2 and len(seats("RolloutActor")) == 1 and seats("RewardActor"):
                self.seats = {name: seats(name) for name in ("RolloutActor", "RewardActor", "LearnerActor", "CoordinatorActor")}
                self._nodes["cluster"].remove_node(self._nodes["small"], allow_graceful=False)
                self._nodes["cluster"].add_node(num_cpus=2, num_gpus=1, resources={"rollout": 1})
                self._removed_at = version
        elif version >= self._removed_at + 4 and seats("RolloutActor") and not self._is_stopped:
            self._is_stopped = True
            stop(self._store)


def test_roles_sit_where_they_should_and_a_node_that_goes_away_costs_nothing(nodes: Nodes, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    parts = parts_of(run_dir, "cluster.rollout_gpus=0.5", "cluster.learner_gpus=2", "rollout.num_workers=1")
    script = Script(RunStore(str(run_dir)), nodes)
    outcome = run_on_ray(parts, script)
    assert outcome.kind is EndKind.STOPPED
    assert script.seats["RolloutActor"] == [nodes["small"].node_id]  # the only node that offers `rollout`
    assert script.seats["RewardActor"] == [nodes["head"].node_id]  # the only one without a GPU
    assert script.seats["LearnerActor"] == [nodes["large"].node_id]  # two GPUs
    assert audit(RunStore(str(run_dir))).violations == ()
