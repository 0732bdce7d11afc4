"""How far a stage is: a bar on a terminal, plain lines elsewhere, and a line of log for each report."""

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from deploy.pretrain.checkpoints import append_record


class StageProgress:
    """Shows and logs the progress of one stage."""

    def __init__(self, stage: str, *, num_steps: int, log: Path, console: Console, is_shown: bool) -> None:
        """Begin.

        Args:
            stage: its name.
            num_steps: how many steps it has.
            log: JSON-lines file that gets one record a report.
            console: where to show.
            is_shown: whether this process shows and logs at all.
        """
        self._stage, self._num_steps, self._log, self._console = stage, num_steps, log, console
        self._is_shown = is_shown
        self._start = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        self._bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task(stage, total=num_steps)
        if is_shown:
            self._bar.start()

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since the stage began, in this start."""
        return time.monotonic() - self._start

    def report(self, step: int, **figures: float) -> None:
        """Show and log a step's figures."""
        if not self._is_shown:
            return
        record: dict[str, Any] = {"stage": self._stage, "step": step, "seconds": round(self.seconds, 1)}
        record |= {name: round(value, 5) for name, value in figures.items()}
        append_record(self._log, record)
        text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self._bar.update(self._task, completed=step, description=f"{self._stage}  {text}")
        if not self._console.is_terminal:
            self._console.print(f"{self._stage}  step {step}/{self._num_steps}  {self.seconds:.0f} s  {text}")

    def close(self) -> None:
        """End the display."""
        if self._is_shown:
            self._bar.stop()
