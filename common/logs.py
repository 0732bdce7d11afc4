"""One way to get a logger: standard library, plain lines, a name a component."""

import logging
import sys


def get_logger(component: str) -> logging.Logger:
    """Return the logger of a component ("learner", "rollout.w0" ...)."""
    return logging.getLogger(f"flowfleet.{component}")


def configure_logging(level: str = "INFO") -> None:
    """Send flowfleet's log lines to standard error, once a process."""
    root = logging.getLogger("flowfleet")
    root.setLevel(level)
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
        root.propagate = False
