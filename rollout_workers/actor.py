"""The Ray shell of a rollout worker: one line a method around the plain object."""

import time
from typing import Any

import ray

from common.runtime import prepare_process
from common.store.actor import DESK_AWAY, CoordinatorClient
from rollout_workers.build import WorkerSettings, build_worker
from rollout_workers.worker import RolloutWorker


@ray.remote
class RolloutActor:
    """A RolloutWorker in a process of its own."""

    def __init__(self, settings: WorkerSettings, coordinator: Any) -> None:
        prepare_process(settings.rollout.num_threads)
        self._settings, self._desk = settings, CoordinatorClient(coordinator)
        self._built: RolloutWorker | None = None

    def _worker(self) -> RolloutWorker:
        if self._built is None:
            self._built = build_worker(self._settings, self._desk, retry_on=DESK_AWAY)
        return self._built

    def ready(self) -> bool:
        """Answer once the worker is built; what building raises comes through as it is."""
        return self._worker() is not None

    def run(self) -> None:
        """Work until the desk says Stop."""
        self._worker().run(time.sleep)
