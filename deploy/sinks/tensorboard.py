"""TensorBoard event files, written with the tensorboard package alone (it brings no framework with it)."""

import importlib
from collections.abc import Mapping
from pathlib import Path

from deploy.sinks.packages import load


class TensorboardSink:
    """One event file an opening; scalars carry the update's own wall time.

    A session-start event with step s, which TensorBoard calls a purge, voids what earlier files hold from s on. It is written at a rewind,
    and at each opening, so that what a follower that died had not noted counts once.

    Args:
        directory: for event files; made when it is missing.
        next_update: the first step that is to come, 0 when nothing was sent.
    """

    def __init__(self, directory: Path, next_update: int) -> None:
        load("tensorboard", "tensorboard")
        self._events = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self._summaries = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        self._files = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        self._directory = str(directory)
        self._open(next_update)

    def _open(self, next_update: int) -> None:
        self._writer = self._files.EventFileWriter(self._directory)
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._writer.add_event(self._events.Event(step=next_update, session_log=start))

    def rewind(self, update: int, incarnation: int) -> int:
        """Void what was logged from `update` on."""
        self._writer.close()
        self._open(update)
        return update

    def log(self, update: int, time_unix: float, scalars: Mapping[str, float]) -> None:
        """Write one event with all scalars; TensorBoard keeps them as float32."""
        values = [self._summaries.Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        summary = self._summaries.Summary(value=values)
        self._writer.add_event(self._events.Event(step=update, wall_time=time_unix, summary=summary))

    def log_evaluation(self, version: int, time_unix: float, scalars: Mapping[str, float]) -> None:
        """The same, at the version's step."""
        self.log(version, time_unix, scalars)

    def flush(self) -> None:
        """Write out."""
        self._writer.flush()

    def close(self) -> None:
        """Write out and close the file."""
        self._writer.close()
