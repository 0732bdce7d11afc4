"""The way of a sampled group out of the worker, in the background: decode, write, announce; one at a time."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import ParamSpec, Protocol, TypeVar

from common.errors import AlreadyExists, CorruptFile, Fenced, StallError, StoreError
from common.gauges import Gauges
from common.heartbeat import HeldLeases
from common.logs import get_logger
from common.protocols import RolloutDesk
from common.types import FloatArray, LeaseKind, MediaBatch, RolloutGroup, RolloutLease, Wait
from rollout_workers.sampler import SamplingError

P = ParamSpec("P")
ResultT = TypeVar("ResultT")

POLL_S = 0.05  # between looks at the background


class GroupSink(Protocol):
    """The run directory as a rollout worker writes it; both calls commit exclusively and may be repeated."""

    def write_group(self, group: RolloutGroup, media: MediaBatch) -> str:
        """Commit a group with its images; return the group file's path. Raises StoreError."""
        ...

    def write_sheet(self, lease: RolloutLease, media: MediaBatch) -> str:
        """Commit an evaluation sheet's images; return its path. Raises StoreError."""
        ...


class InlineExecutor(Executor):
    """Runs a task at once, in the caller's thread: for --local. What the task raises, submit raises."""

    def submit(self, fn: Callable[P, ResultT], /, *args: P.args, **kwargs: P.kwargs) -> Future[ResultT]:
        """Return a finished future."""
        future: Future[ResultT] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledWork:
    """What a lease became: clean latents to decode, and for a TRAIN lease the group to commit."""

    lease: RolloutLease
    group: RolloutGroup | None  # None for EVAL
    final_latents: FloatArray  # [K, C, h, w]
    seconds: float  # of sampling


@dataclass(slots=True, kw_only=True)
class _Parcel:
    """A group on its way out: it survives failed writes, so that nothing is decoded twice."""

    work: SampledWork
    deadline: float  # of the injected clock
    started: float
    media: MediaBatch | None = None
    trouble: StoreError | None = None  # of the last try
    retry_at: float = 0.0
    num_refusals: int = 0
    future: Future[None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryLimits:
    """Seconds that a delivery may take."""

    retry_s: float = 2.0  # after a store error
    deadline_s: float = 600.0  # from hand-over to the announced commit


class Delivery:
    """Takes sampled work, at most one at a time, and tells the desk when its file is committed.

    A store that refuses is tried again every retry_s until the deadline; then its error ends the loop. A file that breaks its
    schema, was written by another, or belongs to a later incarnation is no weather: it ends the loop at once.
    """

    def __init__(
        self, desk: RolloutDesk, sink: GroupSink, decode: Callable[[FloatArray], MediaBatch], executor: Executor, *,
        held: HeldLeases, gauges: Gauges, limits: DeliveryLimits | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._desk, self._sink, self._decode, self._executor = desk, sink, decode, executor
        self._held, self._gauges, self._clock = held, gauges, clock
        self._limits = limits or DeliveryLimits()
        self._parcel: _Parcel | None = None

    def hand_over(self, work: SampledWork) -> None:
        """Start to deliver; the one before must be settled."""
        assert self._parcel is None, "Delivery.hand_over: the parcel before is not settled"
        now = self._clock()
        self._parcel = _Parcel(work=work, started=now, deadline=now + self._limits.deadline_s)
        self._send(self._parcel)

    def tend(self) -> bool:
        """Look at the pending parcel without waiting; True while the store is in trouble.

        Sends a refused parcel again when it is time. Raises what the delivery raised; StoreError or StallError at the deadline.
        """
        parcel, now = self._parcel, self._clock()
        if parcel is None or parcel.future is None:
            return False
        if parcel.future.done() and parcel.trouble is not None and parcel.retry_at <= now < parcel.deadline:
            self._send(parcel)
        if parcel.future.done():
            parcel.future.result()
            if parcel.trouble is None:
                self._parcel = None
                return False
        if now >= parcel.deadline:
            raise self._late(parcel) from parcel.trouble
        return parcel.num_refusals > 0

    def settle(self) -> Iterator[Wait]:
        """Wait until nothing is pending. Raises as tend does."""
        while True:
            in_trouble = self.tend()
            if self._parcel is None:
                return
            yield Wait(seconds=self._limits.retry_s if in_trouble else POLL_S, reason="store away" if in_trouble else "commit")

    def recover(self) -> Iterator[Wait]:
        """Wait only while the store is in trouble, so that no further group is taken on meanwhile."""
        if self.tend():
            yield from self.settle()

    def _send(self, parcel: _Parcel) -> None:
        parcel.trouble = None
        parcel.future = self._executor.submit(self._deliver, parcel)

    def _deliver(self, parcel: _Parcel) -> None:
        """Decode once, write, announce. Runs in the background; leaves a store's refusal in parcel.trouble."""
        lease = parcel.work.lease
        try:
            if parcel.media is None:
                with self._gauges.timed("decoding_seconds_total"):
                    parcel.media = self._decode(parcel.work.final_latents)
            with self._gauges.timed("committing_seconds_total"):
                path = self._write(parcel.work, parcel.media)
                self._desk.commit_rollout(lease.lease_id, path, parcel.work.seconds + self._clock() - parcel.started)
        except (AlreadyExists, CorruptFile, Fenced):
            raise
        except StoreError as error:
            parcel.trouble, parcel.retry_at = error, self._clock() + self._limits.retry_s
            parcel.num_refusals += 1
            self._gauges.add("store_errors_total", 1)
            get_logger("rollout").warning("delivery of lease %s: the store refused (%s); trying again", lease.lease_id, error)
            return
        except SamplingError as error:
            self._desk.fail_rollout(lease.lease_id, str(error))
        self._held.discard(lease.lease_id)

    def _late(self, parcel: _Parcel) -> StoreError | StallError:
        place = f"rollout delivery: lease {parcel.work.lease.lease_id} was not committed within {self._limits.deadline_s:.0f} s"
        if parcel.trouble is None:
            return StallError(f"{place}; decoding or writing hangs; look at the store's latency")
        return StoreError(f"{place}; mend the run directory's storage and resume; the last refusal: {parcel.trouble}")

    def _write(self, work: SampledWork, media: MediaBatch) -> str:
        if work.lease.kind is LeaseKind.TRAIN:
            assert work.group is not None, "a TRAIN lease became a group"
            return self._sink.write_group(work.group, media)
        return self._sink.write_sheet(work.lease, media)
