"""Three Ray nodes on this host and a run directory on S3 (moto's server on loopback), which goes away for twenty seconds in mid-run."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from common.store.audit import audit
from common.store.ending import EndKind
from common.store.run_store import RunStore
from deploy.ray_run import run_on_ray
from tests.fleet_runs import PATIENCE_S
from tests.s3_server import BUCKET, S3Server, served
from tests.test_fleet_nodes import parts_of, stop

pytestmark = pytest.mark.slow

AWAY_S = 20.0


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    """The store; its endpoint stands in the environment that the nodes inherit."""
    with served() as running:
        yield running


@pytest.fixture(scope="module")
def cluster(server: S3Server) -> Iterator[Cluster]:
    """A head and two more nodes."""
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    for _ in range(2):
        started.add_node(num_cpus=2)
    started.wait_for_nodes()
    ray.init(address=started.address, log_to_driver=False)
    yield started
    ray.shutdown()
    started.shutdown()


class Outage:
    """Called with every summary: takes the store away once, and asks for the end some updates after it came back."""

    def __init__(self, server: S3Server, store: RunStore) -> None:
        self._server, self._store = server, store
        self._deadline = time.monotonic() + 2 * PATIENCE_S
        self.thread: threading.Thread | None = None
        self.versions: list[int] = []  # when it went, when it was back
        self._is_stopped = False

    def __call__(self, summary: dict[str, Any]) -> None:
        assert time.monotonic() < self._deadline, summary
        version = summary["version"] or 0
        if self.thread is None and version >= 3:
            self.versions.append(version)
            self.thread = threading.Thread(target=self._be_away)
            self.thread.start()
        elif self.thread is not None and not self.thread.is_alive() and not self._is_stopped:
            self.versions = [*self.versions[:1], *(self.versions[1:] or [version])]
            if version >= self.versions[1] + 3:
                self._is_stopped = True
                stop(self._store)

    def _be_away(self) -> None:
        self._server.stop()
        time.sleep(AWAY_S)
        self._server.start()


@pytest.mark.usefixtures("cluster")
def test_a_run_on_s3_waits_for_its_store_and_goes_on(server: S3Server) -> None:
    url = f"s3://{BUCKET}/fleet/run"
    parts, store = parts_of(url, "rollout.num_workers=2"), RunStore(url)
    script = Outage(server, store)
    outcome = run_on_ray(parts, script)
    assert outcome.kind is EndKind.STOPPED
    assert script.thread is not None
    script.thread.join(AWAY_S)
    report = audit(store)
    assert report.violations == ()
    assert report.num_manifests >= script.versions[1] + 3
