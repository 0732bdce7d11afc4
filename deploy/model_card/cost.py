"""What a version cost, from the run's files: starts, running time, hours of what was reserved, images, updates."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.config import parse
from common.errors import CorruptFile
from common.store import paths
from common.store.manifests import read_claim
from common.store.run_store import RunStore
from deploy.compose import server_gpus
from deploy.config import RunConfig
from deploy.report.compare import TableRow
from deploy.report.records import RunHistory

POINT = 0.01  # of a reward: what a cost is told for
_HOUR = 3600.0
_GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class StartCost:
    """One start of the run, as far as the exported version."""

    incarnation: int
    started_at: str
    config_digest: str
    num_updates: int  # metrics files that it wrote, also those that a later start wrote again
    running_s: float  # from its first update's beginning to its last one's end
    roles: str  # as configured
    gpus: float  # reserved by the configuration, all roles together
    cores: int | None  # of the machine that started it
    environment: Mapping[str, Any]  # empty: the start left none

    @property
    def hours(self) -> float:
        """Running hours."""
        return self.running_s / _HOUR

    @property
    def machine(self) -> str:
        """The processor, cores and memory of the machine that started it; "" where no environment is on file."""
        told = self.environment
        parts = [str(told[key]) for key in ("cpu", "gpus", "devices") if told.get(key)]
        parts += [f"{told['num_cpus']} cores"] if told.get("num_cpus") else []
        parts += [f"{float(told['memory_bytes']) / _GIB:.0f} GiB"] if told.get("memory_bytes") else []
        return ", ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardPrice:
    """What the rise of one frozen reward cost."""

    reward: str
    rise: float
    images: float  # trained on, per POINT
    hours: float  # of running, per POINT


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCost:
    """The whole cost of a version."""

    starts: tuple[StartCost, ...]
    num_updates: int
    images_trained: int
    images_evaluated: int  # under the protocol that the card follows
    dropped_groups: int
    prices: tuple[RewardPrice, ...]  # of rewards that rose

    @property
    def hours(self) -> float:
        """Running hours of all starts."""
        return sum(start.hours for start in self.starts)

    @property
    def gpu_hours(self) -> float:
        """Hours of the reserved GPUs."""
        return sum(start.hours * start.gpus for start in self.starts)

    @property
    def core_hours(self) -> float | None:
        """Hours of all cores of the starting machines; None where a start that ran tells no cores."""
        ran = [start for start in self.starts if start.running_s > 0]
        return sum(start.hours * (start.cores or 0) for start in ran) if all(start.cores for start in ran) else None


def read_cost(store: RunStore, history: RunHistory, rows: Sequence[TableRow], version: int) -> RunCost:
    """Return what the run spent until a version.

    Args:
        store: the run.
        history: of the run as far as the version.
        rows: its before/after table; empty where the exported version has none.
        version: updates of later numbers are left out.

    Raises:
        CorruptFile: a metrics, config or environment file breaks its form.
    """
    listing = store.list()
    spans = _spans(store, listing, version)
    incarnations = sorted(number for path in listing if (number := paths.parse_config(path)) is not None)
    starts = tuple(_start(store, number, spans.get(number, [])) for number in incarnations)
    images, hours = sum(record.images for record in history.updates), sum(start.hours for start in starts)
    prices = [
        RewardPrice(reward=row.reward, rise=row.difference, images=images * POINT / row.difference, hours=hours * POINT / row.difference)
        for row in rows
        if row.is_mean and row.verdict == "rose"
    ]
    return RunCost(
        starts=starts, num_updates=len(history.updates), images_trained=images, prices=tuple(prices),
        images_evaluated=sum(len(record.rows) for record in history.evaluations),
        dropped_groups=sum(count for record in history.updates for count in record.drops.values()),
    )  # fmt: skip


def _spans(store: RunStore, listing: Sequence[str], version: int) -> dict[int, list[tuple[float, float]]]:
    """Incarnation -> (wall clock at the end, seconds) of each of its updates, in order."""
    found: dict[int, list[tuple[float, float]]] = {}
    for path in sorted(listing):
        name = paths.parse_metrics(path)
        if name is not None and name[0] <= version:
            told = read_object(store, path)
            try:
                span = (float(told["time_unix"]), sum(float(value) for value in told["seconds"].values()))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise CorruptFile(f"export: {path} is no metrics file ({error}); restore it, or move it away") from error
            found.setdefault(name[1], []).append(span)
    return found


def _start(store: RunStore, incarnation: int, spans: Sequence[tuple[float, float]]) -> StartCost:
    claim = read_claim(store, incarnation)
    config = parse(RunConfig, json.loads(json.dumps(dict(claim.config))), paths.config_path(incarnation))
    path = paths.environment_path(incarnation)
    environment = read_object(store, path) if store.exists(path) else {}
    running = spans[0][1] + max(spans[-1][0] - spans[0][0], 0.0) if spans else 0.0
    cores = environment.get("num_cpus")
    return StartCost(
        incarnation=incarnation, started_at=claim.started_at, config_digest=claim.config_digest, num_updates=len(spans), running_s=running, roles=_roles(config),
        gpus=_gpus(config), cores=cores if isinstance(cores, int) else None, environment=environment,
    )  # fmt: skip


def _roles(config: RunConfig) -> str:
    rewards = sum(reward.num_servers for reward in config.reward)
    counts = ((config.rollout.num_workers, "rollout worker"), (config.learner.num_ranks, "learner rank"), (rewards, "reward server"))
    return ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for count, name in counts)


def _gpus(config: RunConfig) -> float:
    cluster = config.cluster
    servers = sum(server_gpus(config, reward) * reward.num_servers for reward in config.reward)
    return cluster.rollout_gpus * config.rollout.num_workers + cluster.learner_gpus * config.learner.num_ranks + servers


def read_object(store: RunStore, path: str) -> dict[str, Any]:
    """Return a JSON object of the run. Raises CorruptFile."""
    try:
        told = json.loads(store.read(path))
    except ValueError as error:
        raise CorruptFile(f"export: {path} is no JSON ({error}); restore it, or move it away") from error
    if not isinstance(told, dict):
        raise CorruptFile(f"export: {path} holds no JSON object; restore it, or move it away")
    return told
