"""Ray: each role's plain object in an actor of its own; the driver only watches."""

import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from common.errors import FlowfleetError
from common.store.actor import CoordinatorActor
from common.store.ending import Outcome
from deploy.compose import RunParts, coordinator_builder
from learner.actor import LearnerActor
from reward_servers.actor import RewardActor
from rollout_workers.actor import RolloutActor

COORDINATOR_THREADS = 32
POLL_S = 0.5
LEAVE_TIMEOUT_S = 60.0  # after the end, until every loop has returned
CALL_TIMEOUT_S = 60.0
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def connect(parts: RunParts, address: str | None) -> None:
    """Join the cluster at `address` (or of the job that this is), or start one on this machine, on loopback."""
    if ray.is_initialized():
        return
    if address is not None:
        ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
        return
    actors = 2 + len(parts.workers) + len(parts.servers)
    ray.init(
        num_cpus=max(2, actors * parts.config.learner.num_threads), include_dashboard=False, log_to_driver=True,
        logging_level=logging.WARNING, configure_logging=False,
    )  # fmt: skip


def run_on_ray(parts: RunParts, show: Callable[[dict[str, Any]], None], address: str | None = None) -> Outcome:
    """Run to the end on Ray.

    Raises:
        FlowfleetError: what a role raised, with its own exit code.
        KeyboardInterrupt: after the Coordinator has written that nobody runs this run.
    """
    connect(parts, address)
    cluster = parts.config.cluster
    shell: Any = CoordinatorActor  # Ray's decorator adds `options` and `remote`
    coordinator = shell.options(num_cpus=0, max_concurrency=COORDINATOR_THREADS).remote(coordinator_builder(parts), cluster.metrics_port)
    actors: dict[str, Any] = {}
    try:
        actors = _start(parts, coordinator)
        running = {actor.run.remote(): name for name, actor in actors.items()}
        outcome = _watch(coordinator, running, show)
        ray.get(coordinator.close.remote(outcome.reason), timeout=CALL_TIMEOUT_S)
        return outcome
    except (FlowfleetError, KeyboardInterrupt) as reason:
        with contextlib.suppress(RayActorError, RayTaskError):
            ray.get(coordinator.close.remote(str(reason) or "interrupted"), timeout=CALL_TIMEOUT_S)
        raise
    finally:
        for actor in [*actors.values(), coordinator]:
            ray.kill(actor)


def _start(parts: RunParts, coordinator: Any) -> dict[str, Any]:
    """Start every role and wait until each has answered once."""
    cluster, config = parts.config.cluster, parts.config
    actors: dict[str, Any] = {"learner": _place(LearnerActor, config.learner.num_threads, cluster.learner_gpus, parts.learner, coordinator)}
    for worker in parts.workers:
        actors[worker.slot] = _place(RolloutActor, config.rollout.num_threads, cluster.rollout_gpus, worker, coordinator)
    for server in parts.servers:
        actors[server.slot] = _place(RewardActor, server.reward.num_threads, cluster.reward_gpus, server, coordinator)
    ready = {actor.ready.remote(): name for name, actor in actors.items()}
    done, late = ray.wait(list(ready), num_returns=len(ready), timeout=cluster.start_timeout_s)
    _raise_first(done, ready)
    if late:
        names = ", ".join(ready[ref] for ref in late)
        raise FlowfleetError(
            f"start: {names} did not answer within cluster.start_timeout_s = {cluster.start_timeout_s:.0f} s; look at the actor's log, or at "
            "`ray status` for missing resources, or raise the limit"
        )
    return actors


def _place(shell: Any, num_threads: int, num_gpus: float, settings: Any, coordinator: Any) -> Any:
    """Start an actor that Ray brings back after a crash; its threads are those of the config."""
    environment = {name: str(num_threads) for name in _THREAD_VARIABLES} | {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    return shell.options(
        num_cpus=num_threads, num_gpus=num_gpus, max_restarts=-1, max_task_retries=-1, runtime_env={"env_vars": environment}
    ).remote(settings, coordinator)


def _watch(coordinator: Any, running: dict[Any, str], show: Callable[[dict[str, Any]], None]) -> Outcome:
    """Look at roles and Coordinator until the run is over and every loop has returned."""
    left_by: float | None = None
    while True:
        done, _ = ray.wait(list(running), num_returns=len(running), timeout=POLL_S) if running else ([], [])
        _raise_first(done, running)
        for ref in done:
            del running[ref]
        outcome: Outcome = _answer(coordinator.tick.remote())
        show(_answer(coordinator.summary.remote()))
        if outcome.is_over:
            left_by = left_by or time.monotonic() + LEAVE_TIMEOUT_S
            if not running or time.monotonic() > left_by:
                return outcome


def _raise_first(done: list[Any], names: dict[Any, str]) -> None:
    for ref in done:
        _answer(ref, names[ref])


def _answer(ref: Any, name: str = "coordinator") -> Any:
    """A call's answer; flowfleet's own errors come through as such, others with the role's name."""
    try:
        return ray.get(ref, timeout=CALL_TIMEOUT_S)
    except RayTaskError as error:
        if isinstance(error.cause, FlowfleetError):
            raise error.cause from None
        raise
    except RayActorError as error:
        cause = error.__cause__ or error
        if isinstance(cause, FlowfleetError):
            raise cause from None
        raise FlowfleetError(f"{name}: its process ended ({error}); resume with the same command") from error
