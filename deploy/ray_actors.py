"""Ray's part of the fleet: join a cluster, start one slot's processes, and say how they ended. No decisions stand here."""

import logging
import os
import re
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from common.errors import AlreadyExists, CorruptFile, Fenced, FlowfleetError, ScorerHung, StoreError
from common.store.actor import CoordinatorGone
from common.store.control import ROLLOUT
from deploy.compose import RunParts, server_gpus, server_settings, worker_settings
from deploy.fleet import LEARNER, SlotEnd
from deploy.learner_group import RankReservation, start_learners
from deploy.placement import Needs, NodeFacts, Role, Seat, pinned_roles, role_of, seat
from learner.ranks import RankLost
from reward_servers.actor import RewardActor
from rollout_workers.actor import RolloutActor

CULPRIT_S = 2.0  # after one rank ended: how long to look for the rank that made it end
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
"""glibc gives every activation back to the kernel and faults it in again: kept instead, sampling on CPU takes a fifth less time."""
_OWN_CLUSTER = {"RAY_worker_niceness": "0", "RAY_task_events_report_interval_ms": "0"}
"""Settings of a cluster that this process starts. Ray's default niceness of 15 makes workers wait for anything else that runs: two busy
programs starve a run until its deadlines pass. Its record of every call, which nothing reads here, makes the Coordinator grow by about 100 bytes a call."""
_PERMANENT = (AlreadyExists, CorruptFile, Fenced)


def connect(parts: RunParts, address: str | None) -> bool:
    """Join the cluster at `address` (or of the job that this is), or start one on this machine, on loopback.

    Returns:
        Whether the cluster is this process's own. There the fleet reserves CPUs for the learner only, so that `scale` is bounded by
        the machine and not by what was reserved at the start.
    """
    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS")
    if address is not None:
        ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
        return False
    ranks = parts.config.learner.num_ranks * parts.config.learner.num_threads
    prepare_own_cluster()
    ray.init(
        address="local", num_cpus=max(2, ranks), include_dashboard=parts.config.cluster.metrics_port > 0, log_to_driver=True, logging_level=logging.WARNING, configure_logging=False,
    )  # fmt: skip
    return True


def prepare_own_cluster() -> None:
    """Set what a cluster started by this process is to run with; what the user has set stands."""
    for name, value in _OWN_CLUSTER.items():
        os.environ.setdefault(name, value)


def live_nodes() -> list[NodeFacts]:
    """The cluster's nodes that are alive."""
    return [NodeFacts(node_id=node["NodeID"], resources=node["Resources"]) for node in ray.nodes() if node["Alive"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a slot's loop ended."""

    kind: SlotEnd
    cause: str = ""


def _identify(_: Any) -> tuple[str, int]:
    return socket.gethostname(), os.getpid()


@dataclass(slots=True, kw_only=True)
class Member:
    """The processes of one slot: one actor, or all ranks of the learner, which live and die together."""

    handles: tuple[Any, ...]
    asked: list[Any]  # references of host and process id, emptied once told
    loading: list[Any]  # references of their first answers
    loops: list[Any]  # references of their loops
    kill: Callable[[], None]
    host: str = ""
    process_ids: tuple[int, ...] = ()

    def identify(self) -> None:
        """Learn hosts and process ids as soon as the processes tell."""
        if self.asked and not _late(self.asked):
            try:
                told: list[tuple[str, int]] = ray.get(self.asked)
                self.host, self.process_ids = told[0][0], tuple(pid for _, pid in told)
            except RayError:
                self.host = ""  # it ended before it told; `end` says how
            self.asked = []

    def is_ready(self) -> bool:
        """Whether every process has answered."""
        return not _late(self.loading)

    def end(self) -> End | None:
        """How its loop ended, None while it goes on. Raises flowfleet's own errors but for a store that is away."""
        done = _done([*self.loops, *self.loading])
        failed = [found for ref in done if (found := _end_of(ref)).kind is not SlotEnd.LEFT]
        if not failed and len(_done(self.loops)) < len(self.loops):
            return None
        if failed and len(self.handles) > 1:
            ray.wait(self.loops, num_returns=len(self.loops), timeout=CULPRIT_S)
            failed += [found for ref in _done(self.loops) if (found := _end_of(ref)).kind is SlotEnd.LOST]
        return failed[0] if failed else End(kind=SlotEnd.LEFT)


def _done(refs: list[Any]) -> list[Any]:
    done: list[Any] = ray.wait(refs, num_returns=len(refs), timeout=0)[0] if refs else []
    return done


def _late(refs: list[Any]) -> bool:
    return len(_done(refs)) < len(refs)


def _end_of(ref: Any) -> End:
    try:
        ray.get(ref)
    except RayTaskError as error:
        return _raised(error.cause)
    except RayActorError as error:
        if isinstance(error.__cause__, FlowfleetError):
            raise error.__cause__ from None
        return End(kind=SlotEnd.LOST, cause=_why_dead(error))
    except RayError as error:
        return End(kind=SlotEnd.LOST, cause=_in_brief(error))
    return End(kind=SlotEnd.LEFT)


def _raised(cause: BaseException) -> End:
    if isinstance(cause, RankLost | RayError | CoordinatorGone):
        return End(kind=SlotEnd.LOST, cause=_in_brief(cause))
    if isinstance(cause, StoreError) and not isinstance(cause, _PERMANENT):
        return End(kind=SlotEnd.STORE, cause=_in_brief(cause))
    if isinstance(cause, ScorerHung):
        return End(kind=SlotEnd.HUNG, cause=_in_brief(cause))
    if isinstance(cause, FlowfleetError):
        raise cause from None
    return End(kind=SlotEnd.RAISED, cause=_in_brief(cause))


def _why_dead(error: RayActorError) -> str:
    """Ray's reason in one clause; its whole message, with ids and advice, is in its own log."""
    found = re.search(r"is dead because ([^.]*)\.", str(error))
    return found[1] if found else _in_brief(error)


def _in_brief(error: BaseException) -> str:
    """The error's kind and its text on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


class Launcher:
    """Starts the processes of a slot where deploy/placement.py says.

    Args:
        parts: of `compose`.
        coordinator: its handle.
        is_own_cluster: of `connect`.
    """

    def __init__(self, parts: RunParts, coordinator: Any, *, is_own_cluster: bool) -> None:
        self._parts, self._coordinator, self._is_own = parts, coordinator, is_own_cluster
        self._sent: Counter[str] = Counter()  # node id -> reward servers sent there
        self._pinned: frozenset[Role] = frozenset()  # roles that go only where their resource is

    def needs(self, slot: str) -> Needs:
        """What a slot's process reserves."""
        config, role = self._parts.config, role_of(slot)
        threads, gpus = config.learner.num_threads, config.cluster.learner_gpus
        if role == "rollout":
            threads, gpus = config.rollout.num_threads, config.cluster.rollout_gpus
        elif role == "reward":
            reward = server_settings(self._parts, slot).reward
            threads, gpus = reward.num_threads, server_gpus(config, reward)
        is_free = self._is_own and role != "learner"
        return Needs(role=role, num_cpus=0.0 if is_free else float(threads), num_gpus=gpus)

    def start(self, slot: str) -> Member:
        """Ask Ray for a slot's processes and set them to work; returns at once."""
        nodes = live_nodes()
        self._pinned = pinned_roles(nodes, self._pinned, grows=self._parts.config.cluster.grows)
        place = seat(self.needs(slot), nodes, self._sent, self._pinned)
        if slot == LEARNER:
            return self._start_learner(place)
        if place.node_id is not None:
            self._sent[place.node_id] += 1
        is_worker = slot.startswith(f"{ROLLOUT}.")
        shell: Any = RolloutActor if is_worker else RewardActor
        settings: Any = worker_settings(self._parts, slot) if is_worker else server_settings(self._parts, slot)
        threads = settings.rollout.num_threads if is_worker else settings.reward.num_threads
        options = {"scheduling_strategy": _strategy(place), "runtime_env": {"env_vars": _environment(threads)}}
        actor = shell.options(
            num_cpus=place.num_cpus, num_gpus=place.num_gpus, resources=dict(place.resources), max_restarts=0, **options
        ).remote(settings, self._coordinator)
        return Member(
            handles=(actor,), asked=[actor.__ray_call__.remote(_identify)], loading=[actor.ready.remote()], loops=[actor.run.remote()],
            kill=lambda: ray.kill(actor),
        )  # fmt: skip

    def _start_learner(self, place: Seat) -> Member:
        config = self._parts.config
        reservation = RankReservation(
            num_cpus=place.num_cpus, num_gpus=place.num_gpus, resources=place.resources,
            environment=_environment(config.learner.num_threads), start_timeout_s=config.cluster.start_timeout_s,
        )  # fmt: skip
        group = start_learners(self._parts.learner, self._coordinator, reservation)
        return Member(
            handles=group.handles, asked=[handle.__ray_call__.remote(_identify) for handle in group.handles],
            loading=list(group.ready()), loops=list(group.run()), kill=group.stop,
        )  # fmt: skip


def _strategy(place: Seat) -> Any:
    if place.node_id is not None:
        return NodeAffinitySchedulingStrategy(place.node_id, soft=True)
    return "SPREAD" if place.spread else "DEFAULT"


def _environment(num_threads: int) -> dict[str, str]:
    """Threads are those of the config, which are part of what a run computes."""
    return (
        {name: str(num_threads) for name in _THREAD_VARIABLES}
        | _MALLOC
        | {
            "TOKENIZERS_PARALLELISM": "false",
            "TRANSFORMERS_VERBOSITY": "error",
        }
    )
