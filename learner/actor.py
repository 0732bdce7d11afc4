"""The Ray shell of the learner: one line a method around the plain object."""

import secrets
import socket
import tempfile
import time
from contextlib import closing
from typing import Any

import ray

from common.runtime import prepare_process
from common.store.actor import DESK_AWAY, CoordinatorClient
from learner.build import LearnerProcess, LearnerSettings, load_learner_policy
from learner.ranks import RankPlace, Ranks, SoloRanks, TorchRanks
from learner.writer import BackgroundWriter


@ray.remote
class LearnerActor:
    """The learner, or one rank of it, in a process of its own."""

    def __init__(self, settings: LearnerSettings, coordinator: Any, rank: int = 0) -> None:
        prepare_process(settings.learner.num_threads)
        self._settings, self._desk, self._rank = settings, CoordinatorClient(coordinator), rank
        self._built: LearnerProcess | None = None

    def _process(self) -> LearnerProcess:
        if self._built is None:
            policy = load_learner_policy(self._settings.model, self._settings.fake)
            self._built = LearnerProcess(self._settings, self._desk, policy, writer=BackgroundWriter())
        return self._built

    def ready(self) -> bool:
        """Answer once the model is loaded; what loading raises comes through as it is."""
        return self._process() is not None

    def rendezvous(self, one_host: bool) -> str:
        """Return a fresh address where the ranks can meet, by rank 0: a file where all share its host, else a port of it."""
        if one_host:
            return f"file://{tempfile.gettempdir()}/flowfleet-ranks-{secrets.token_hex(8)}"
        with closing(socket.create_server(("", 0))) as server:
            return f"tcp://{ray.util.get_node_ip_address()}:{server.getsockname()[1]}"

    def run(self, address: str | None = None) -> None:
        """Train until the desk says Stop: alone, or as rank 0 of those that meet at `address`."""
        with closing(self._join(address)), self._process().heartbeat(retry_on=DESK_AWAY) as heartbeat:
            for wait in self._process().loop():
                heartbeat.check()
                time.sleep(wait.seconds)

    def follow(self, address: str) -> None:
        """Take part as another rank until rank 0 stops."""
        with closing(self._join(address)):
            for wait in self._process().follow():
                time.sleep(wait.seconds)

    def _join(self, address: str | None) -> Ranks:
        ranks = SoloRanks() if address is None else TorchRanks(self._place(address), self._process().policy.device)
        self._process().join(ranks)
        return ranks

    def _place(self, address: str) -> RankPlace:
        config = self._settings.learner
        return RankPlace(rank=self._rank, size=config.num_ranks, address=address, timeout_s=config.rank_timeout_s)
