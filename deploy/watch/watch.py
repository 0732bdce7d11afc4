"""`flowfleet watch RUN`: a live view made from the run's files alone. It only reads: the run cannot tell that it is watched."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.live import Live

from common.errors import CorruptFile, StoreError
from deploy.watch.files import Look, RunTail
from deploy.watch.plain import PlainLines
from deploy.watch.view import clean, view

EXIT_DONE, EXIT_NOT_DONE = 0, 1


class Display(Protocol):
    """Where looks are shown; used as a context."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def show(self, look: Look) -> None:
        """Show the newest look."""
        ...

    def note(self, trouble: str) -> None:
        """Say that the run directory could not be read; the next look that works says no more of it."""
        ...


class Screen:
    """A terminal: one picture, drawn again at each look; the last one stays."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False)
        self._look: Look | None = None

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()

    def show(self, look: Look) -> None:
        """Draw."""
        self._look = look
        self._draw()

    def note(self, trouble: str) -> None:
        """Draw the look before, with the trouble in red."""
        if self._look is None:
            self._console.print(clean(trouble), style="red", highlight=False, markup=False, soft_wrap=True)
        else:
            self._draw(trouble)

    def _draw(self, trouble: str = "") -> None:
        if self._look is not None:
            size = self._console.size
            self._live.update(view(self._look, size.width, size.height, trouble), refresh=True)


class Log:
    """Anything else: lines, each written at once."""

    def __init__(self, console: Console) -> None:
        self._console, self._lines, self._trouble = console, PlainLines(), ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def show(self, look: Look) -> None:
        """Write what is new."""
        if self._trouble:
            self._say("the run directory answers again")
        self._trouble = ""
        for line in self._lines.lines(look):
            self._say(line)

    def note(self, trouble: str) -> None:
        """Write a trouble once."""
        if not self._trouble:
            self._say(clean(trouble))
        self._trouble = trouble

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
        self._console.file.flush()


def watch_once(tail: RunTail, console: Console) -> int:
    """Print one look as a screen; return the exit code: 1 when the run stopped too soon, or nobody writes its status."""
    look = tail.look()
    console.print(view(look, console.size.width))
    return EXIT_NOT_DONE if look.is_silent else exit_code(look)


def watch_run(tail: RunTail, console: Console, every_s: float, *, sleep: Callable[[float], None] = time.sleep) -> int:
    """Show a run until it ends; return the exit code.

    A run that has not begun, a status that nobody writes and a store that is away are told and waited for: a watch ends when the
    run does, or at Ctrl-C, which is the ordinary way to leave it (0).

    Raises:
        UserError: there is no run.
        CorruptFile: a file of the run breaks its form.
    """
    display: Display = Screen(console) if console.is_terminal else Log(console)
    try:
        with display:
            while True:
                look = _try_look(tail, display)
                if look is not None and look.is_over and not look.num_unread:
                    return exit_code(look)
                sleep(every_s)
    except KeyboardInterrupt:
        console.print("left; the run is not touched", highlight=False)
        return EXIT_DONE


def _try_look(tail: RunTail, display: Display) -> Look | None:
    try:
        look = tail.look()
    except CorruptFile:
        raise
    except StoreError as away:
        display.note(f"{away}; looking again")
        return None
    display.show(look)
    return look


def exit_code(look: Look) -> int:
    """0 for a run that works, or went as far as it was meant to; 1 for one that stopped before: a request, a guard or a failure, as it says."""
    return EXIT_NOT_DONE if look.is_over and not look.is_finished else EXIT_DONE
