"""What is logged during a test, whoever configured the loggers before."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class LogLines(logging.Handler):
    """Keeps messages."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.text += record.getMessage() + "\n"


@contextmanager
def heard() -> Iterator[LogLines]:
    """Everything that flowfleet and the libraries under it log meanwhile."""
    lines, loggers = LogLines(), [logging.getLogger(), logging.getLogger("flowfleet")]
    for logger in loggers:
        logger.addHandler(lines)
    try:
        yield lines
    finally:
        for logger in loggers:
            logger.removeHandler(lines)
