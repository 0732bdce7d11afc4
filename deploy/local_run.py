"""`--local`: the same three loops in one thread of one process, turn by turn; one base model, adapters swapped in place."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from common.policy.base import Policy
from common.runtime import prepare_process
from common.store.ending import Outcome
from common.store.run_store import RunStore
from common.types import Wait
from deploy.compose import RunParts, coordinator_builder, single_worker
from learner.build import LearnerProcess
from reward_servers.build import build_server
from reward_servers.server import scoring_loop
from rollout_workers.build import build_local_worker

IDLE_S = 0.02  # between rounds in which every loop waits


def run_local(parts: RunParts, show: Callable[[dict[str, Any]], None], policy: Policy | None = None) -> Outcome:
    """Run to the end in this process.

    Args:
        parts: of `compose`.
        show: takes the Coordinator's summary after each round.
        policy: a loaded one to use instead of loading the model (tests).

    Returns:
        How the run ended; a guard's end is the caller's to raise.
    """
    prepare_process(parts.config.learner.num_threads)
    coordinator = coordinator_builder(parts)()
    learner = LearnerProcess(parts.learner, coordinator, policy)
    worker = build_local_worker(single_worker(parts), coordinator, learner.policy, RunStore(parts.store_url))
    loops: dict[str, Iterator[Wait]] = {"rollout": worker.loop()}
    loops |= {server.slot: scoring_loop(build_server(server, coordinator)) for server in parts.servers}
    loops["learner"] = learner.loop()
    try:
        while loops:
            take_turns(loops)
            coordinator.tick()
            show(coordinator.summary())
            time.sleep(IDLE_S)
    finally:
        coordinator.close("the local process ends")
    return coordinator.outcome()


def take_turns(loops: dict[str, Iterator[Wait]]) -> None:
    """Let each loop work until it waits; loops that have returned leave the table."""
    for name in list(loops):
        try:
            next(loops[name])
        except StopIteration:
            del loops[name]
