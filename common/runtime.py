"""What a process sets about itself before it works: threads and logs (no torch import where none is loaded)."""

import sys

from common.logs import configure_logging


def prepare_process(num_threads: int, level: str = "INFO") -> None:
    """Limit torch to `num_threads` when torch is loaded (OpenMP collapses when processes share cores) and open the log."""
    configure_logging(level)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(num_threads)
