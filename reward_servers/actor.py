"""The Ray shell of a reward server: one line a method around the plain object."""

import time
from typing import Any

import ray

from common.runtime import prepare_process
from common.store.actor import DESK_AWAY, CoordinatorClient
from reward_servers.build import ServerSettings, build_heartbeat, build_server
from reward_servers.server import RewardServer


@ray.remote
class RewardActor:
    """A RewardServer in a process of its own."""

    def __init__(self, settings: ServerSettings, coordinator: Any) -> None:
        prepare_process(settings.reward.num_threads)
        self._settings, self._desk = settings, CoordinatorClient(coordinator)
        self._built: RewardServer | None = None

    def _server(self) -> RewardServer:
        if self._built is None:
            self._built = build_server(self._settings, self._desk, is_restarted=True)
        return self._built

    def ready(self) -> bool:
        """Answer once the scorer is loaded; what loading raises comes through as it is."""
        return self._server() is not None

    def run(self) -> None:
        """Score until the desk says Stop."""
        self._server().run_until_stopped(time.sleep, build_heartbeat(self._server(), self._desk, retry_on=DESK_AWAY))
