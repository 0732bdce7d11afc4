"""How a scorer is called: straight, or in a thread of its own with a deadline.

A call that hangs inside a thread cannot be ended; only its process can. So one daemon thread serves all calls, the loop waits for it no
longer than the deadline, and after one call too late nothing is called any more: `hung` says why, and the server that sees it gives its
leases back and ends its process, which the fleet starts again. A child process a call could be killed, but would load its model anew or
hold it twice; a scorer that wants one has env = a Python of its own. The deadline sees calls that let other threads run; code that
keeps the interpreter's lock stops the heartbeat too, and its leases expire by silence.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Final, Protocol

from common.errors import ScorerHung
from common.gauges import Gauges
from common.types import Score
from reward_servers.breaker import ScorerBroken

GRACE_S: Final = 0.5
"""Beyond the deadline, so that a scorer that keeps the same one by itself can say so."""

Call = Callable[[], list[Score]]


class ScorerCalls(Protocol):
    """Runs scorer calls, one at a time."""

    @property
    def hung(self) -> str:
        """Why nothing can be called any more; empty while calls end in time."""
        ...

    def run(self, call: Call, num_images: int) -> list[Score]:
        """Return what the call returns, or raise what it raises. Raises ScorerHung when it is late, and from then on."""
        ...


class DirectCalls:
    """Calls in the caller's thread, without a deadline."""

    hung = ""

    def run(self, call: Call, num_images: int) -> list[Score]:
        """Call."""
        return call()


class CountedCalls:
    """Counts the calls in the total calls_total, and their seconds in score_seconds_total: no pause between them, no other loop's turn.

    Args:
        calls: runs them.
        gauges: of the server.
    """

    def __init__(self, calls: ScorerCalls, gauges: Gauges) -> None:
        self._calls, self._gauges = calls, gauges
        self.broken = ""  # what a call said that cannot be answered again in this process

    @property
    def hung(self) -> str:
        """Why nothing can be called any more."""
        return self._calls.hung

    def run(self, call: Call, num_images: int) -> list[Score]:
        """Count, call and time, a call that fails or hangs too."""
        self._gauges.add("calls_total", 1)
        try:
            with self._gauges.timed("score_seconds_total"):
                return self._calls.run(call, num_images)
        except ScorerBroken as error:
            self.broken = str(error)
            raise


class DeadlineCalls:
    """Calls in one daemon thread, each with a deadline.

    Args:
        name: of the reward, for messages.
        deadline_s: an image's; a call on n images gets n times as long.
    """

    def __init__(self, name: str, deadline_s: float) -> None:
        self._name, self._deadline_s = name, deadline_s
        self._calls: queue.SimpleQueue[tuple[Call, Future[list[Score]]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._hung = ""

    @property
    def hung(self) -> str:
        """Why nothing can be called any more."""
        return self._hung

    def run(self, call: Call, num_images: int) -> list[Score]:
        """Call and wait. Raises ScorerHung."""
        if self._hung:
            raise ScorerHung(self._hung)
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name=f"scorer-{self._name}", daemon=True)
            self._thread.start()
        answer: Future[list[Score]] = Future()
        self._calls.put((call, answer))
        limit_s = self._deadline_s * num_images
        try:
            return answer.result(limit_s + GRACE_S)
        except TimeoutError:
            if answer.done():  # at the last moment, or the scorer raised a TimeoutError of its own
                return answer.result()
            self._hung = (
                f"deadline: scorer {self._name} did not answer for {num_images} images within {limit_s:g} s (deadline_s = {self._deadline_s:g} "
                "an image); a call that hangs ends its process; mend the scorer, or raise deadline_s if it is only slow"
            )
            raise ScorerHung(self._hung) from None

    def _serve(self) -> None:
        while True:
            call, answer = self._calls.get()
            with _Carried(answer):
                answer.set_result(call())


class _Carried:
    """Hands whatever its block raises to the one who waits."""

    def __init__(self, answer: Future[list[Score]]) -> None:
        self._answer = answer

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if error is not None:
            self._answer.set_exception(error)
        return True
