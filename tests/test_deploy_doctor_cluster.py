"""`flowfleet doctor --address`: a real cluster of two nodes is asked from a process of its own."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from deploy.doctor.checks import Status
from deploy.doctor.ray import look_at_cluster

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two Ray nodes on loopback whose home directories differ, so that a path under ~ is node-local."""
    homes = [tmp_path_factory.mktemp(f"home{index}") for index in range(2)]
    project = Path(__file__).parent.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(homes[0]))
        patch.setenv("PYTHONPATH", f"{project}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        patch.setenv("HOME", str(homes[1]))
        cluster.add_node(num_cpus=1)
        patch.setenv("HOME", str(homes[0]))
        yield cluster.address
        cluster.shutdown()


def test_every_node_of_a_cluster_says_what_it_is_and_looks_at_the_store(address: str, tmp_path: Path) -> None:
    rows = {row.what: row for row in look_at_cluster(address, str(tmp_path / "run"))}
    assert rows["cluster versions"].status is Status.OK, rows
    assert rows["cluster versions"].found.startswith("2 node(s): Ray ")
    assert rows["cluster clocks"].status is Status.OK and rows["cluster store"].status is Status.OK
    home = {row.what: row for row in look_at_cluster(address, "~/run")}
    assert home["cluster store"].status is Status.FAIL and "1 of 2 nodes do not share" in home["cluster store"].found


def test_an_address_without_a_head_is_told_within_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.doctor.ray.CLUSTER_S", 5.0)
    (row,) = look_at_cluster("127.0.0.1:1", None)
    assert row.status is Status.FAIL and row.remedy
