"""A small --local run that kills itself (-9) at one commit: `python -m tests.boundary_child MODEL RUN_DIR RECIPE PATTERN MOMENT NTH`."""

import os
import re
import signal
import sys
from pathlib import Path

from common.store.backends import LocalFiles
from deploy.session import run_session
from tests.run_fixtures import QUIET, local_options, small_config


def arm(pattern: str, moment: str, nth: int) -> None:
    """Make the nth creation of a file whose path matches end this process, just before or just after it is committed."""
    seen = 0
    create = LocalFiles.create

    def deadly(self: LocalFiles, path: str, content: bytes, writer_id: str) -> None:
        nonlocal seen
        if re.search(pattern, path) is None:
            create(self, path, content, writer_id)
            return
        seen += 1
        if moment == "before" and seen == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        create(self, path, content, writer_id)
        if moment == "after" and seen == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    LocalFiles.create = deadly  # type: ignore[method-assign]


def main(model: str, run_dir: str, recipe: str, pattern: str, moment: str, nth: str) -> None:
    """Run until the kill."""
    arm(pattern, moment, int(nth))
    config = small_config(Path(model), recipe, "schedule.max_staleness=0", "evaluation.at_start=false")
    run_session(config, local_options(Path(run_dir)), QUIET)


if __name__ == "__main__":
    main(*sys.argv[1:])
