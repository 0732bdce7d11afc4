"""The store probe from every node: a directory that one node alone has is refused at start with what each node saw."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from common.errors import GateError
from common.store.run_store import RunStore
from deploy import store_probe
from deploy.store_probe import NodeView, check_store_from_nodes, judge, probe_content, probe_path, probe_store

TOKEN = "aa11"


def plant(store: RunStore) -> None:
    """The driver's part."""
    store.create_exclusive(probe_path(TOKEN), probe_content(TOKEN), writer_id="driver")


def test_a_node_that_shares_the_store_sees_it_and_leaves_a_file(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    plant(store)
    views = [probe_store(str(tmp_path), TOKEN, f"node{index}") for index in range(2)]
    assert [view.problem for view in views] == ["", ""]
    assert sorted([*(view.written for view in views), probe_path(TOKEN)]) == store.list(".probe")
    judge(store, views)


def test_a_node_with_a_directory_of_its_own_is_named_with_what_it_saw_and_the_remedy(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "driver"))
    plant(store)
    views = [probe_store(str(tmp_path / place), TOKEN, f"node {place}") for place in ("driver", "alone")]
    with pytest.raises(GateError) as caught:
        judge(store, views)
    assert caught.value.name == "store"
    message = str(caught.value)
    assert "1 of 2 nodes do not share" in message
    assert f"node alone does not see the driver's file .probe/{TOKEN}.driver in its {tmp_path / 'alone'}" in message
    assert "a shared file system mounted at the same path everywhere, or an s3:// run directory" in message
    assert not (tmp_path / "alone").exists()


def test_a_node_whose_store_breaks_a_promise_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunStore(str(tmp_path))
    store.create_exclusive(probe_path(TOKEN), b"of another probe", writer_id="driver")
    assert "reads other bytes" in probe_store(str(tmp_path), TOKEN, "n").problem
    store.replace(probe_path(TOKEN), probe_content(TOKEN))
    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "list", lambda self, prefix="": [])
        assert "its listings are stale" in probe_store(str(tmp_path), TOKEN, "n").problem
    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "create_exclusive", lambda self, path, content, writer_id: None)
        assert "creates are not exclusive between nodes" in probe_store(str(tmp_path), TOKEN, "n").problem
    assert "keep them in the environment" in probe_store("s3://key:word@bucket/run", TOKEN, "n").problem


def test_a_file_of_a_node_that_the_driver_does_not_see_is_refused_too(tmp_path: Path) -> None:
    plant(RunStore(str(tmp_path)))
    with pytest.raises(GateError, match=r"n wrote \.probe/aa11\.77, and the driver does not see it"):
        judge(RunStore(str(tmp_path)), [NodeView(node="n", problem="", written=".probe/aa11.77")])


def test_memory_is_refused_with_ray() -> None:
    with pytest.raises(GateError, match=r"memory://run lives in one process.*--local"):
        check_store_from_nodes("memory://run", [])


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
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
        ray.init(address=cluster.address, log_to_driver=False)
        yield ray.nodes()
        ray.shutdown()
        cluster.shutdown()


def test_every_node_of_a_cluster_is_asked_and_a_shared_directory_passes(nodes: list[dict[str, Any]], tmp_path: Path) -> None:
    assert len(nodes) == 2
    check_store_from_nodes(str(tmp_path / "run"), nodes)
    assert RunStore(str(tmp_path / "run")).list() == []


def test_a_path_under_the_home_directory_is_refused_when_homes_are_node_local(
    nodes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(GateError, match=r"1 of 2 nodes do not share .*does not see the driver's file .*home1"):
        check_store_from_nodes("~/run", nodes)
    gone = [{**node, "NodeID": "ee" * 28} if index else node for index, node in enumerate(nodes)]
    monkeypatch.setattr(store_probe, "NODE_TIMEOUT_S", 60.0)
    with pytest.raises(GateError, match=r"node .* \(eeeeeeee\) (could not be asked|did not answer)"):
        check_store_from_nodes("~/run", gone)
