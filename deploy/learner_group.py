"""The learner's ranks on Ray: placed together, run together; when one is lost, the fleet stops the rest and starts all again."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from common.errors import ConfigError
from learner.actor import LearnerActor
from learner.build import LearnerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReservation:
    """What Ray keeps for each rank."""

    num_cpus: float
    num_gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)  # custom ones, where the cluster offers them
    environment: Mapping[str, str] = field(default_factory=dict)  # of the rank's process
    start_timeout_s: float = 300.0  # until every rank has its place and has loaded its model; the fleet watches it

    @property
    def bundle(self) -> dict[str, float]:
        """As a placement group counts it."""
        return {"CPU": self.num_cpus, **({"GPU": self.num_gpus} if self.num_gpus else {}), **self.resources}


class LearnerGroup:
    """The processes of one learner: a single one, or several ranks that live and die as one.

    None comes back by itself. After a loss the fleet calls `stop` and `start_learners` again: all ranks load the newest
    LearnerState and run the manifest that exists; nothing is sampled again.
    """

    def __init__(self, settings: LearnerSettings, coordinator: Any, reservation: RankReservation) -> None:
        """Ask for places and start loading; returns at once.

        Raises:
            ConfigError: several ranks would share a GPU.
        """
        size = settings.learner.num_ranks
        if size > 1 and 0 < reservation.num_gpus < 1:
            raise ConfigError(
                f"learner: {size} ranks with cluster.learner_gpus = {reservation.num_gpus:g}; nccl needs a GPU of its own for each rank; "
                "set cluster.learner_gpus = 1 or learner.num_ranks = 1"
            )
        self._one_host = fits_one_node(reservation.bundle, size, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        self._placement = placement_group([reservation.bundle] * size, strategy="STRICT_PACK" if self._one_host else "PACK")
        self.handles: tuple[Any, ...] = tuple(self._start_rank(rank, settings, coordinator, reservation) for rank in range(size))

    def _start_rank(self, rank: int, settings: LearnerSettings, coordinator: Any, reservation: RankReservation) -> Any:
        shell: Any = LearnerActor  # Ray's decorator adds `options`
        return shell.options(
            num_cpus=reservation.num_cpus, num_gpus=reservation.num_gpus, resources=dict(reservation.resources), max_restarts=0,
            runtime_env={"env_vars": dict(reservation.environment)},
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=rank),
        ).remote(settings, coordinator, rank)  # fmt: skip

    def ready(self) -> dict[Any, str]:
        """Reference -> name of every rank's first answer, for ray.wait; their errors are those of loading."""
        return {handle.ready.remote(): _name(rank) for rank, handle in enumerate(self.handles)}

    def run(self) -> dict[Any, str]:
        """Set all ranks to work as soon as they are loaded; return reference -> name of their loops, which end when the run does.

        A loop raises RankLost when another rank is gone; where that one's own loop says more, its error is the one to show.
        """
        if len(self.handles) == 1:
            return {self.handles[0].run.remote(): _name(0)}
        address = self.handles[0].rendezvous.remote(self._one_host)  # Ray hands each call the address itself
        loops = {self.handles[0].run.remote(address): _name(0)}
        return loops | {handle.follow.remote(address): _name(rank) for rank, handle in enumerate(self.handles) if rank}

    def stop(self) -> None:
        """Kill every rank and give the places back."""
        for handle in self.handles:
            ray.kill(handle)
        remove_placement_group(self._placement)


def start_learners(settings: LearnerSettings, coordinator: Any, reservation: RankReservation) -> LearnerGroup:
    """Start the learner's ranks, apart from all other actors: their places are a placement group that nobody else uses.

    All on one node where one is large enough (STRICT_PACK), else on few (PACK).
    """
    return LearnerGroup(settings, coordinator, reservation)


def fits_one_node(bundle: Mapping[str, float], size: int, nodes: list[Mapping[str, float]]) -> bool:
    """Whether some node's resources, in total, hold all ranks."""
    return any(all(node.get(name, 0.0) >= size * amount for name, amount in bundle.items()) for node in nodes)


def _name(rank: int) -> str:
    """For messages: learner, learner.1, learner.2 ..."""
    return f"learner.{rank}" if rank else "learner"
