"""The driver on Ray: carries out the fleet's orders, hears requests and signals, and watches until the run is over."""

import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ray

from common.errors import CorruptFile, FlowfleetError, StoreError
from common.logs import get_logger
from common.store.control import ControlReader, ControlRequest
from common.store.directive import Directive, FleetReport, SlotReport
from common.store.ending import EndKind, Outcome
from common.store.run_store import RunStore
from deploy.autoscale import Autoscaler
from deploy.compose import RunParts
from deploy.coordinator_link import CoordinatorLink
from deploy.fleet import LEARNER, FleetBook, FleetLimits, Phase, SlotEnd, slot_name
from deploy.placement import problems
from deploy.ray_actors import Launcher, Member, connect, live_nodes
from deploy.signals import StopSignals
from deploy.store_probe import check_store_from_nodes
from deploy.wishes import configured_sizes, take_requests, waits_of

POLL_S = 0.5
CONTROL_POLL_S = 2.0  # between looks at control/
LEAVE_TIMEOUT_S = 60.0  # after a guard's end: who hangs is not waited for
AT_ONCE_S = 2.0  # the last word to the Coordinator after a second signal
NUM_DECISIONS = 10

_log = get_logger("driver")


def run_on_ray(
    parts: RunParts, show: Callable[[dict[str, Any]], None], address: str | None = None, signals: StopSignals | None = None
) -> Outcome:
    """Run to the end on Ray.

    Args:
        parts: of `compose`.
        show: takes the Coordinator's summary about twice a second.
        address: of a cluster; None: of the job that this is, or one of this process's own.
        signals: what asks for a drain; without it nothing does.

    Raises:
        FlowfleetError: what a role raised, with its own exit code.
        KeyboardInterrupt: at a second signal; the Coordinator was told, and every process is ended.
    """
    is_own = connect(parts, address)
    members: dict[str, Member] = {}
    link: CoordinatorLink | None = None
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        if len(nodes) > 1 or parts.store_url.startswith("memory://"):
            check_store_from_nodes(parts.store_url, nodes)
        link = CoordinatorLink(parts)
        if signals is not None:
            signals.arm()
        driver = Driver(parts, Launcher(parts, link.handle, is_own_cluster=is_own), link, members=members, signals=signals)
        outcome = driver.run(show)
        link.close(outcome.reason)
        return outcome
    except FlowfleetError as reason:
        if link is not None:
            link.close(str(reason))
        raise
    except KeyboardInterrupt:
        if link is not None:
            link.close("interrupted at once", AT_ONCE_S)
        raise
    finally:
        for member in members.values():
            member.kill()
        if link is not None:
            link.kill()
        if is_own:
            ray.shutdown()


class Driver:
    """One start's supervisor. Its state is the book, the members' handles and the wanted sizes.

    Args:
        parts: of `compose`.
        launcher: starts a slot.
        link: to the Coordinator.
        members: slot -> processes; the caller kills what is left in it.
        signals: see run_on_ray.
    """

    def __init__(
        self, parts: RunParts, launcher: Launcher, link: CoordinatorLink, *, members: dict[str, Member], signals: StopSignals | None
    ) -> None:
        cluster = parts.config.cluster
        self._parts, self._launcher, self._link, self._members, self._signals = parts, launcher, link, members, signals
        limits = FleetLimits(start_timeout_s=cluster.start_timeout_s, drain_timeout_s=cluster.drain_timeout_s, grows=cluster.grows)
        self._book = FleetBook(limits)
        self._control = ControlReader(RunStore(parts.store_url), parts.incarnation)
        self._sizes = configured_sizes(parts.config)
        self._decisions: deque[str] = deque(maxlen=NUM_DECISIONS)
        self._began = time.monotonic()
        self._autoscaler = Autoscaler(parts.config.autoscale, self._began)
        self._summary: dict[str, Any] = {}
        self._control_at = self._began
        self._ended: Outcome | None = None
        self._leave_by = 0.0
        self._learner_left = False
        self._told_late: set[str] = set()

    def run(self, show: Callable[[dict[str, Any]], None]) -> Outcome:
        """Watch until the run is over and every loop has returned, or had its time to."""
        self._take(self._control.poll(), is_start=True)
        self._check_places()
        while True:
            self._hear()
            self._watch_members()
            if self._tick() and self._ended is None:  # after the tick: who left because the run is over is not started again
                self._carry_out()
            if self._summary:
                show(self._summary)
            if self._ended is not None and (not self._members or time.monotonic() > self._leave_by):
                return self._conclude(self._ended)
            refs = [ref for member in self._members.values() for ref in member.loops]
            if refs:
                ray.wait(refs, num_returns=1, timeout=POLL_S)
            else:
                time.sleep(POLL_S)

    # ---- requests and signals

    def _hear(self) -> None:
        """Take what came from signals, control files and the autoscaler."""
        now = time.monotonic()
        if self._signals is not None and self._signals.reason:
            self._end(Outcome(kind=EndKind.STOPPED, reason=f"{self._signals.reason}; the same command goes on"))
        if now - self._control_at >= CONTROL_POLL_S:
            self._control_at = now
            try:
                self._take(self._control.poll())
            except CorruptFile:
                raise
            except StoreError as error:
                _log.warning("control requests cannot be read (%s); trying again", error)
        if self._ended is None and self._summary and all(r.phase is Phase.RUNNING for r in self._book.slots.values()):
            decision = self._autoscaler.ask(waits_of(self._summary), self._sizes, now)
            if decision is not None:
                self._resize({decision.pool: decision.size}, decision.sentence)

    def _take(self, requests: Mapping[int, ControlRequest], *, is_start: bool = False) -> None:
        for sizes, sentence, stop in take_requests(requests, self._sizes, is_start=is_start):
            if stop:
                self._end(Outcome(kind=EndKind.STOPPED, reason=sentence))
            else:
                self._resize(sizes, sentence)

    def _resize(self, sizes: Mapping[str, int], sentence: str) -> None:
        self._sizes |= sizes
        self._autoscaler.changed(time.monotonic())
        self._say(sentence)

    def _say(self, sentence: str) -> None:
        """Log a decision, and keep it for status.json."""
        _log.info("%s", sentence)
        self._decisions.append(f"{time.strftime('%H:%M:%S')} {sentence}")

    def _end(self, outcome: Outcome) -> None:
        """From now on everybody is told to leave; the first end stands."""
        if self._ended is None:
            self._ended = outcome
            is_orderly = outcome.kind in (EndKind.DONE, EndKind.TIME_LIMIT, EndKind.STOPPED)
            patience_s = self._parts.config.cluster.drain_timeout_s if is_orderly else LEAVE_TIMEOUT_S
            self._leave_by = time.monotonic() + patience_s

    def _conclude(self, outcome: Outcome) -> Outcome:
        left_over = sorted(self._members)
        if not left_over:
            return outcome
        return replace(outcome, reason=f"{outcome.reason}; {', '.join(left_over)} did not leave in time and are killed")

    # ---- the fleet

    def _wanted(self) -> dict[str, int]:
        return {**self._sizes, LEARNER: 0 if self._learner_left else 1}

    def _check_places(self) -> None:
        """Refuse at once what no node of the cluster can hold."""
        nodes, grows = live_nodes(), self._parts.config.cluster.grows
        wanted = [(self._launcher.needs(slot_name(pool, 0)), size) for pool, size in self._wanted().items() if size]
        found = [text for needs, size in wanted for text in problems(needs, size, nodes, grows=grows)]
        if found:
            raise FlowfleetError(f"start: {'; '.join(found)}")

    def _carry_out(self) -> None:
        """Kill who hangs or does not leave, drain, start."""
        now = time.monotonic()
        orders = self._book.orders(self._wanted(), now)
        limit_s = self._parts.config.schedule.group_timeout_s
        hanging = dict.fromkeys(self._hanging(), f"it beats, but held a lease for more than group_timeout_s = {limit_s:g} s")
        for slot, why in {**orders.kill, **hanging}.items():
            self._remove(slot, SlotEnd.LOST, f"killed: {why}")
        for slot in orders.drain:
            if slot in self._book.slots and self._book.draining(slot, now):
                self._say(f"{slot} is drained: it finishes what it holds, and leaves")
        for slot in orders.start:
            counts = {name: self._summary.get(name, {}).get(slot, 0) for name in ("work", "overruns")}
            self._book.started(slot, now, **counts)
            self._members[slot] = self._launcher.start(slot)
        self._tell_late(now)

    def _hanging(self) -> list[str]:
        return [slot for slot in self._book.hanging(self._summary.get("overruns", {})) if slot in self._members]

    def _tell_late(self, now: float) -> None:
        limit_s = self._parts.config.cluster.start_timeout_s
        for record in self._book.late(now):
            text = (
                f"{record.slot} did not answer within cluster.start_timeout_s = {limit_s:.0f} s; look at the actor's log, or at `ray status` for "
                "missing resources, or raise the limit"
            )
            if not self._book.may_wait(record):
                raise FlowfleetError(f"start: {text}")
            if record.slot not in self._told_late:
                self._told_late.add(record.slot)
                self._say(text)

    def _watch_members(self) -> None:
        """See who answered, who left and whose process is gone."""
        for slot, member in list(self._members.items()):
            member.identify()
            end = member.end()
            if end is not None:
                self._remove(slot, end.kind, end.cause)
            elif self._book.slots[slot].phase is Phase.STARTING and member.is_ready():
                self._book.became_ready(slot, time.monotonic())
                self._told_late.discard(slot)

    def _remove(self, slot: str, kind: SlotEnd, cause: str) -> None:
        self._members.pop(slot).kill()
        self._learner_left = self._learner_left or (slot == LEARNER and kind is SlotEnd.LEFT)
        if self._ended is None:
            work = self._summary.get("work", {}).get(slot, 0)
            self._say(self._book.ended(slot, kind, cause, time.monotonic(), work=work))
        else:
            del self._book.slots[slot]

    # ---- the Coordinator

    def _tick(self) -> bool:
        """Give the Coordinator the driver's word and take its own; False while it is away."""
        outcome: Outcome | None = self._link.ask("tick", self._directive(), say=self._say)
        summary: dict[str, Any] | None = self._link.ask("summary", say=self._say)
        if outcome is None or summary is None:
            return False
        self._summary = summary
        if outcome.is_over:
            self._end(outcome)
        return True

    def _directive(self) -> Directive:
        slots = {
            slot: SlotReport(state=str(record.phase), crashes=record.crashes, **self._identity(slot))
            for slot, record in sorted(self._book.slots.items())
        }
        report = FleetReport(driver_process_id=os.getpid(), sizes=dict(self._sizes), slots=slots, decisions=tuple(self._decisions))
        return Directive(
            drained=self._book.drained(), ended=self._ended, elapsed_s=time.monotonic() - self._began, learner_left=self._learner_left,
            report=report,
        )  # fmt: skip

    def _identity(self, slot: str) -> dict[str, Any]:
        member = self._members.get(slot)
        return {} if member is None else {"host": member.host, "process_ids": member.process_ids}
