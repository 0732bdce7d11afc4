"""SIGINT and SIGTERM: the first asks for a drain and a saved state, the second ends at once."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

HANDLED = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Takes both signals while entered.

    Until `arm` there is nothing to save, and the first signal raises KeyboardInterrupt; afterwards the first one sets `reason`
    for the driver's loop to see, and the second raises. Later ones are ignored, so that leaving is not cut short.

    Args:
        say: tells the user that the first one was understood.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._before: dict[signal.Signals, signal.Handlers | Callable[[int, FrameType | None], object] | int | None] = {}
        self._is_armed, self._count = False, 0
        self.reason = ""  # "" until the first one

    def __enter__(self) -> Self:
        self._install()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def arm(self) -> None:
        """From now on the first signal drains. Installs the handlers again: `ray.init` puts its own over SIGTERM."""
        self._is_armed = True
        self._install()

    def _install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # signals are the main thread's
        for number in HANDLED:
            before = signal.signal(number, self._take)
            self._before.setdefault(number, before)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if self._is_armed and self._count == 1:
            self.reason = f"{signal.Signals(number).name} came"
            self._say(f"{self.reason}: the run drains and saves its state; once more ends it at once")
            return
        if self._count == 1 or (self._is_armed and self._count == 2):
            raise KeyboardInterrupt
