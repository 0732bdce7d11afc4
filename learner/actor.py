"""The Ray shell of the learner: one line a method around the plain object."""

import time
from typing import Any

import ray

from common.runtime import prepare_process
from common.store.actor import DESK_AWAY, CoordinatorClient
from learner.build import LearnerProcess, LearnerSettings


@ray.remote
class LearnerActor:
    """The learner in a process of its own."""

    def __init__(self, settings: LearnerSettings, coordinator: Any) -> None:
        prepare_process(settings.learner.num_threads)
        self._settings, self._desk = settings, CoordinatorClient(coordinator)
        self._built: LearnerProcess | None = None

    def _process(self) -> LearnerProcess:
        if self._built is None:
            self._built = LearnerProcess(self._settings, self._desk)
        return self._built

    def ready(self) -> bool:
        """Answer once the model is loaded; what loading raises comes through as it is."""
        return self._process() is not None

    def run(self) -> None:
        """Train until the desk says Stop."""
        with self._process().heartbeat(retry_on=DESK_AWAY) as heartbeat:
            for wait in self._process().loop():
                heartbeat.check()
                time.sleep(wait.seconds)
