"""Who writes an update's files: a thread beside the loop, or the loop itself."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from common.errors import StallError
from common.types import Wait

POLL_S = 0.02
WRITE_TIMEOUT_S = 1800.0  # for the files of one update; the store's own retries end long before


class Writer(Protocol):
    """Runs one job at a time, in the order they come; after a failed job it runs no other."""

    def submit(self, what: str, job: Callable[[], None]) -> None:
        """Take a job; the writer is idle. `what` names it in messages."""
        ...

    def idle(self) -> Iterator[Wait]:
        """Yield until the last job is done. Raises what ended it; StallError past the deadline."""
        ...

    def check(self) -> None:
        """Raise what ended the last job, if anything did."""
        ...

    def close(self) -> None:
        """Let the running job end and take no more."""
        ...


class InlineWriter:
    """The loop writes itself: one thread, so a run in one process is the same at every start."""

    def submit(self, what: str, job: Callable[[], None]) -> None:
        """See Writer."""
        job()

    def idle(self) -> Iterator[Wait]:
        """See Writer."""
        yield from ()

    def check(self) -> None:
        """See Writer."""

    def close(self) -> None:
        """See Writer."""


class BackgroundWriter:
    """A thread writes while the loop goes on with the next update."""

    def __init__(self, *, timeout_s: float = WRITE_TIMEOUT_S, clock: Callable[[], float] = time.monotonic) -> None:
        """timeout_s: for one job, by the clock."""
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="learner-writer")
        self._timeout_s, self._clock = timeout_s, clock
        self._running: Future[None] | None = None
        self._what, self._since = "", 0.0

    def submit(self, what: str, job: Callable[[], None]) -> None:
        """See Writer."""
        assert self._running is None, "BackgroundWriter: submit after idle() only"
        self._what, self._since = what, self._clock()
        self._running = self._executor.submit(job)

    def idle(self) -> Iterator[Wait]:
        """See Writer."""
        while self._running is not None and not self._running.done():
            if self._clock() - self._since > self._timeout_s:
                raise StallError(f"learner: {self._what} took longer than {self._timeout_s:.0f} s; look at the store, then resume")
            yield Wait(seconds=POLL_S, reason=f"store: {self._what}")
        self.check()

    def check(self) -> None:
        """See Writer."""
        if self._running is not None and self._running.done():
            self._running.result()
            self._running = None

    def close(self) -> None:
        """See Writer."""
        self._executor.shutdown(wait=True)
