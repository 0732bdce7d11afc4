"""The rollout worker: ask a lease, make sure of the version, sample, hand over to the background, repeat."""

import time
from collections.abc import Callable, Iterator
from typing import Protocol

from common.errors import AlreadyExists, CorruptFile, Fenced, StoreError
from common.gauges import Gauges
from common.heartbeat import Heartbeat, HeldLeases
from common.logs import get_logger
from common.protocols import RolloutDesk
from common.types import RolloutLease, Stop, Wait
from rollout_workers.delivery import Delivery, SampledWork
from rollout_workers.sampler import SamplingError
from rollout_workers.weights import Weights

RETRY_S = 2.0  # after a policy file could not be read
WEIGHTS_DEADLINE_S = 600.0  # of such failures in a row


class LeaseSampler(Protocol):
    """Samples what a lease asks for (rollout_workers.studio.Studio)."""

    def sample(self, lease: RolloutLease) -> SampledWork:
        """Return a group (TRAIN) or a sheet (EVAL). Raises SamplingError."""
        ...


def rollout_loop(
    slot: str, desk: RolloutDesk, weights: Weights, studio: LeaseSampler, delivery: Delivery, *,
    held: HeldLeases, gauges: Gauges, clock: Callable[[], float] = time.monotonic,
) -> Iterator[Wait]:  # fmt: skip
    """Work until the desk says Stop; yield a Wait whenever there is nothing to do (the caller sleeps).

    Raises:
        GateError: the weights that arrived are not the learner's.
        StoreError: the run directory refused longer than the deadline, or holds what it must not.
    """
    readable_at = clock()
    while True:
        yield from delivery.recover()
        lease = desk.ask_rollout(slot)
        if isinstance(lease, Stop):
            yield from delivery.settle()
            return
        if isinstance(lease, Wait):
            yield lease
            continue
        held.add(lease.lease_id)
        try:
            work = _sample(lease, slot, desk, weights, studio)
            readable_at = clock()
        except SamplingError as error:
            desk.fail_rollout(lease.lease_id, str(error))
            held.discard(lease.lease_id)
            continue
        except StoreError as error:
            desk.return_rollout(lease.lease_id, str(error))
            held.discard(lease.lease_id)
            _check_patience(error, clock() - readable_at)
            yield Wait(seconds=RETRY_S, reason="policy file")
            continue
        _count(gauges, work)
        yield from delivery.settle()
        delivery.hand_over(work)


def _sample(lease: RolloutLease, slot: str, desk: RolloutDesk, weights: Weights, studio: LeaseSampler) -> SampledWork:
    with weights.bound(lease.publication, lease.snapshot) as receipt:
        desk.confirm_weights(slot, receipt)
        return studio.sample(lease)


def _check_patience(error: StoreError, away_s: float) -> None:
    """Raise an error that waiting cannot mend, or that lasted too long."""
    if isinstance(error, AlreadyExists | CorruptFile | Fenced) or away_s > WEIGHTS_DEADLINE_S:
        raise error
    get_logger("rollout").warning("a policy file cannot be read (%s); trying again", error)


def _count(gauges: Gauges, work: SampledWork) -> None:
    num_images = len(work.final_latents)
    gauges.add("groups_total" if work.group is not None else "sheets_total", 1)
    gauges.add("images_total", num_images)
    gauges.add("sampling_seconds_total", work.seconds)
    gauges.set("images_per_second", num_images / work.seconds if work.seconds > 0 else 0.0)


class RolloutWorker:
    """A loop with its heartbeat, as a plain object: deploy/ builds it, an actor or a thread runs it."""

    def __init__(
        self, slot: str, desk: RolloutDesk, weights: Weights, studio: LeaseSampler, delivery: Delivery, *,
        held: HeldLeases, gauges: Gauges, heartbeat: Heartbeat | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """Keep the parts; `held` and `gauges` are the ones that delivery and heartbeat share. No heartbeat: the caller beats."""
        self._slot, self._desk, self._weights, self._studio, self._delivery = slot, desk, weights, studio, delivery
        self._held, self._gauges, self._heartbeat, self._clock = held, gauges, heartbeat, clock

    def loop(self) -> Iterator[Wait]:
        """Return the loop for a caller that drives it itself (--local)."""
        return rollout_loop(
            self._slot, self._desk, self._weights, self._studio, self._delivery, held=self._held, gauges=self._gauges, clock=self._clock
        )

    def beat(self) -> None:
        """Keep the held leases alive and hand over the gauges, where no heartbeat does (--local)."""
        self._desk.beat(self._slot, self._held.snapshot(), self._gauges.snapshot())

    def run(self, sleep: Callable[[float], None]) -> None:
        """Drive the loop to its end. Raises what ended it, or what ended the heartbeat."""
        if self._heartbeat is None:
            self._drive(sleep)
            return
        with self._heartbeat:
            self._drive(sleep)

    def _drive(self, sleep: Callable[[float], None]) -> None:
        for wait in self.loop():
            if self._heartbeat is not None:
                self._heartbeat.check()
            started = self._clock()
            sleep(wait.seconds)
            self._gauges.add("waiting_seconds_total", self._clock() - started, wait.reason)
