"""The process that serves one reward: `python -m reward_servers.wire.serve_main NAME --options JSON`.

Runs in an environment of its own, so it imports neither torch nor Ray nor Arrow; the scorer brings what it needs.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from common.config import json_object, parse
from common.errors import ConfigError, FlowfleetError
from common.logs import configure_logging
from common.protocols import Scorer
from reward_servers.guarded import SCORER_FAILURES
from reward_servers.user_scorers import load_user_scorer
from reward_servers.wire.http_server import serve
from reward_servers.wire.settings import ServeSettings

_LAST_WORD_S: Final = 10.0


def load_scorer(name: str, options: Mapping[str, Any]) -> Scorer:
    """Make a reward by name, user code without the registry, which needs more packages than an environment of its own may have.

    Raises:
        ConfigError: unknown name or option, or a package that this environment lacks.
    """
    if ":" in name:
        return load_user_scorer(name, options)
    try:
        from reward_servers.registry import make_scorer  # noqa: PLC0415 (heavy: see above)
    except ImportError as error:
        raise ConfigError(f"reward {name}: {sys.executable} lacks {error.name or error}; install it into that environment") from error
    return make_scorer(name, options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal comes, or until standard input closes with --watch-stdin. Returns the exit code.

    One JSON line goes to standard output: {"port", "name", "version"} when clients can connect, or {"error"}. Whatever the scorer prints goes
    to standard error.
    """
    parser = argparse.ArgumentParser(prog="serve_main", description="Serve one reward over HTTP.")
    parser.add_argument("name", help="of `flowfleet reward ls`, or module:attribute")
    parser.add_argument("--options", default="{}", help="the scorer's options as JSON")
    parser.add_argument("--settings", default="{}", help="ServeSettings as JSON: host, port, token_file, limits")
    parser.add_argument("--watch-stdin", action="store_true", help="end when standard input closes, as it does when the parent dies")
    given = parser.parse_args(arguments)
    say = _announcer()
    configure_logging()
    if given.watch_stdin:
        threading.Thread(target=_end_with_stdin, name="stdin", daemon=True).start()
    try:
        settings = parse(ServeSettings, json_object("--settings", given.settings), "--settings")
        scorer = load_scorer(given.name, json_object("--options", given.options))
        serve(scorer, settings, announce=lambda port: say({"port": port, "name": scorer.name, "version": scorer.version}))
    except FlowfleetError as error:
        say({"error": str(error)})
        return error.exit_code
    except (ImportError, *SCORER_FAILURES) as error:
        say({"error": f"reward {given.name} cannot be served: {type(error).__name__}: {error}"})
        return 1
    return 0


def _announcer() -> Callable[[Mapping[str, Any]], None]:
    """Keep standard output for announcements alone: file descriptor 1 becomes standard error."""
    sys.stdout.flush()
    channel = os.dup(1)
    os.dup2(2, 1)

    def say(message: Mapping[str, Any]) -> None:
        os.write(channel, json.dumps(message).encode() + b"\n")

    return say


def _end_with_stdin() -> None:
    """Wait for the end of standard input, then end this process: politely, after a while at once."""
    while os.read(0, 1 << 12):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_LAST_WORD_S)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
