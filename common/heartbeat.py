"""The heartbeat: a thread that keeps a component's leases alive and hands over its gauges, and whose failure is not lost."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Final, Protocol, Self

from common.logs import get_logger

BEAT_INTERVAL_S = 5.0
MICRO_BATCHES: Final = "micro_batches_total"
"""A total of the learner's beats: while it grows an update goes on, however long it takes."""


class BeatDesk(Protocol):
    """The one call that a heartbeat needs; RolloutDesk, ScoringDesk and LearnerDesk all have it."""

    def beat(self, slot: str, lease_ids: Sequence[str], metrics: Mapping[str, float]) -> None:
        """Keep leases alive and hand over gauges."""
        ...


class HeldLeases:
    """The lease ids that a component holds now, shared between its loop, its background thread and its heartbeat."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids: dict[str, None] = {}

    def add(self, lease_id: str) -> None:
        """Hold a lease."""
        with self._lock:
            self._ids[lease_id] = None

    def discard(self, lease_id: str) -> None:
        """Let a lease go; one that is not held is no error."""
        with self._lock:
            self._ids.pop(lease_id, None)

    def snapshot(self) -> tuple[str, ...]:
        """Return the held ids in the order they came."""
        with self._lock:
            return tuple(self._ids)


class Heartbeat:
    """Beats every `interval_s` from a thread of its own, from `start` (or `with`) until `stop`."""

    def __init__(
        self, slot: str, desk: BeatDesk, held: HeldLeases, metrics: Callable[[], Mapping[str, float]], *,
        interval_s: float = BEAT_INTERVAL_S, patience_s: float = 60.0, retry_on: tuple[type[Exception], ...] = (),
    ) -> None:  # fmt: skip
        """Prepare a heartbeat.

        Args:
            slot: the component's name at the desk.
            desk: who hears the beat.
            held: the leases to keep alive.
            metrics: gives the gauges of the moment.
            interval_s: seconds between beats.
            patience_s: how long errors of `retry_on` may follow one another before they end the heartbeat.
            retry_on: errors of a desk that is away for a moment (a restart); all others end the heartbeat at once.
        """
        self._slot, self._desk, self._held, self._metrics = slot, desk, held, metrics
        self._interval_s, self._patience_s, self._retry_on = interval_s, patience_s, retry_on
        self._stopped = threading.Event()
        self._executor: ThreadPoolExecutor | None = None
        self._ended: Future[None] | None = None

    def start(self) -> None:
        """Begin to beat. Calling it twice is no error."""
        if self._executor is None:
            self._stopped.clear()
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"beat-{self._slot}")
            self._ended = self._executor.submit(self._beat_until_stopped)

    def check(self) -> None:
        """Raise what ended the heartbeat, if anything did."""
        if self._ended is not None and self._ended.done():
            self._ended.result()

    def stop(self) -> None:
        """End the thread and wait for it; raise what ended it before its time."""
        self._stop_thread()
        self.check()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop_thread()
        if error is None:
            self.check()

    def _stop_thread(self) -> None:
        self._stopped.set()
        if self._executor is not None:
            self._executor.shutdown(wait=True)
            self._executor = None

    def _beat_until_stopped(self) -> None:
        heard = time.monotonic()
        while not self._stopped.is_set():
            try:
                self._desk.beat(self._slot, self._held.snapshot(), self._metrics())
                heard = time.monotonic()
            except self._retry_on as error:
                if time.monotonic() - heard > self._patience_s:
                    raise
                get_logger(self._slot).warning("heartbeat: the desk is away (%s); trying again in %.0f s", error, self._interval_s)
            self._stopped.wait(self._interval_s)
