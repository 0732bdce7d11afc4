"""`--local`: the same three loops in one thread of one process, turn by turn; one base model, adapters swapped in place."""

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

from common.metrics import serve_metrics
from common.policy.base import Policy
from common.runtime import prepare_process
from common.store.control import ROLLOUT, ControlReader, reward_pool
from common.store.coordinator import Coordinator
from common.store.directive import Directive, FleetReport, SlotReport
from common.store.ending import EndKind, Outcome
from common.store.run_store import STORE_PATIENCE_S, RunStore
from common.types import Wait
from deploy.compose import RunParts, coordinator_builder, single_worker
from deploy.signals import StopSignals
from deploy.wishes import configured_sizes, take_requests
from learner.build import LearnerProcess
from reward_servers.build import build_server
from reward_servers.server import scoring_loop
from rollout_workers.build import build_local_worker

IDLE_S = 0.02  # between rounds in which every loop waits
CONTROL_POLL_S = 2.0


def run_local(
    parts: RunParts, show: Callable[[dict[str, Any]], None], policy: Policy | None = None, *, signals: StopSignals | None = None
) -> Outcome:
    """Run to the end in this process.

    Args:
        parts: of `compose`.
        show: takes the Coordinator's summary after each round.
        policy: a loaded one to use instead of loading the model (tests).
        signals: what asks for a drain; without it nothing does.

    Returns:
        How the run ended; a guard's end is the caller's to raise.
    """
    prepare_process(parts.config.learner.num_threads)
    coordinator = coordinator_builder(parts, store_patience_s=STORE_PATIENCE_S)()
    cluster = parts.config.cluster
    end_serving = serve_metrics(coordinator.metrics.registry, cluster.metrics_port, cluster.metrics_host) if cluster.metrics_port else None
    try:
        return _run(parts, coordinator, show, policy=policy, signals=signals)
    finally:
        if end_serving is not None:
            end_serving()


def _run(
    parts: RunParts, coordinator: Coordinator, show: Callable[[dict[str, Any]], None], *, policy: Policy | None, signals: StopSignals | None
) -> Outcome:
    """Let the loops take turns until all have returned."""
    learner = LearnerProcess(parts.learner, coordinator, policy)
    settings, files = single_worker(parts), RunStore(parts.store_url, patience_s=STORE_PATIENCE_S)
    worker = build_local_worker(settings, coordinator, learner.policy, files)
    loops: dict[str, Iterator[Wait]] = {settings.slot: worker.loop()}
    servers = [build_server(server, coordinator) for server in parts.servers]
    loops |= {server.slot: scoring_loop(server) for server in servers}
    loops["learner"] = learner.loop()
    stops = LocalStops(parts, signals)
    try:
        while loops:
            take_turns(loops)
            worker.beat()
            for server in servers:
                server.beat()
            coordinator.tick(Directive(ended=stops.look(), report=local_report(parts, loops)))
            show(coordinator.summary())
            time.sleep(IDLE_S)
    finally:
        coordinator.close(coordinator.outcome().reason or "the local process ends")
    return coordinator.outcome()


def local_report(parts: RunParts, loops: Collection[str]) -> FleetReport:
    """The one process as a fleet: a slot a loop, and the sizes that there can be."""
    here = SlotReport(state="running", host=socket.gethostname(), process_ids=(os.getpid(),))
    servers = Counter(reward_pool(server.reward.name) for server in parts.servers)
    return FleetReport(driver_process_id=os.getpid(), sizes={ROLLOUT: 1, **servers}, slots=dict.fromkeys(sorted(loops), here))


class LocalStops:
    """Who asked this process to stop: a signal, or `flowfleet stop`. There is no fleet to scale here."""

    def __init__(self, parts: RunParts, signals: StopSignals | None) -> None:
        self._control, self._signals = ControlReader(RunStore(parts.store_url, patience_s=STORE_PATIENCE_S), parts.incarnation), signals
        self._sizes, self._looked_at = configured_sizes(parts.config), time.monotonic()
        self._ended: Outcome | None = None
        if signals is not None:
            signals.arm()

    def look(self) -> Outcome | None:
        """The end that was asked for, None while nobody has."""
        if self._signals is not None and self._signals.reason and self._ended is None:
            self._ended = Outcome(kind=EndKind.STOPPED, reason=f"{self._signals.reason}; the same command goes on")
        now = time.monotonic()
        if now - self._looked_at >= CONTROL_POLL_S:
            self._looked_at = now
            for _, sentence, stop in take_requests(self._control.poll(), self._sizes, is_start=False):
                if stop and self._ended is None:
                    self._ended = Outcome(kind=EndKind.STOPPED, reason=sentence)
        return self._ended


def take_turns(loops: dict[str, Iterator[Wait]]) -> None:
    """Let each loop work until it waits; loops that have returned leave the table."""
    for name in list(loops):
        try:
            next(loops[name])
        except StopIteration:
            del loops[name]
