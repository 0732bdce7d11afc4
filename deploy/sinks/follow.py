"""The follower: reads what is new in a run's files, hands it to a sink, and remembers what it handed over.

`python -m deploy.sinks.follow` is the process that a driver starts for each sink (deploy/sinks/starter.py): so nothing foreign runs in the
driver, and it may hang, crash or be killed. It ends when its standard input does, that is when the driver ends or lets it go, and at the
latest finish_timeout_s afterwards.
"""

import argparse
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from common.errors import CorruptFile, FlowfleetError, StoreError, UserError
from common.logs import configure_logging, get_logger
from common.store import paths
from common.store.manifests import read_claim
from common.store.run_store import RunStore
from deploy.report.records import EvaluationRecord, RunHistory, UpdateRecord
from deploy.sinks.base import Sink, evaluation_scalars, update_scalars
from deploy.sinks.settings import SinksSection
from deploy.sinks.tensorboard import TensorboardSink
from deploy.sinks.wandb import RunIdentity, WandbSink
from deploy.watch.files import Look, RunTail

NICENESS = 10  # the run's own processes go first
EXIT_LATE = 4
_log = get_logger("sinks")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What a sink has got of a run."""

    key: str = ""  # of the run, its first start's writer_id; "" in files from before there were keys
    update: int = 0  # the last one
    incarnation: int = 0  # that ran it
    evaluations: tuple[tuple[int, str], ...] = ()  # version, folder
    rewound_by: int = 0  # the last start that took updates back, 0 for none


class SentFile:
    """Sent, in a file that only the follower of one sink writes. Raises StoreError.

    Args:
        store, path: where it is.
        key: of the run; what was sent of another run does not count.
    """

    def __init__(self, store: RunStore, path: str, key: str) -> None:
        self._store, self._path, self._key = store, path, key

    def read(self) -> Sent:
        """What was sent; nothing when there is no file, or another run's. Raises CorruptFile."""
        if not self._store.exists(self._path):
            return Sent(key=self._key)
        try:
            sent = TypeAdapter(Sent).validate_json(self._store.read(self._path))
            return replace(sent, key=self._key) if sent.key in ("", self._key) else Sent(key=self._key)
        except ValidationError:
            raise CorruptFile(
                f"sinks: {self._store.url}/{self._path} does not say what was sent; without it all is sent again: remove it"
            ) from None

    def write(self, sent: Sent) -> None:
        """Replace the file."""
        self._store.replace(self._path, json.dumps(asdict(sent)).encode(), writer_id="sink")


class Follower:
    """Hands a run's new numbers to a sink: an update once, but after a rewind or the follower's own death; in order.

    The sink is opened at the first look, so that a missing package is told at once; of a run that is over only when there is news.

    Args:
        tail: reads the run.
        file: where it is kept what was sent.
        open_sink: makes the sink from what was sent.
    """

    def __init__(self, tail: RunTail, file: SentFile, open_sink: Callable[[Sent, Look], Sink]) -> None:
        self._tail, self._file, self._open_sink = tail, file, open_sink
        self._sink: Sink | None = None
        self._sent: Sent | None = None

    def step(self) -> Sent:
        """Hand over what is new; return what was sent by now. Raises what the sink raises, StoreError, CorruptFile."""
        look = self._tail.look()
        sent = self._file.read() if self._sent is None else self._sent
        self._sent = sent
        has_news = _first_again(sent, look.history) is not None or bool(_updates(sent, look.history) or _evaluations(sent, look.history))
        if self._sink is None and (has_news or not look.is_over):
            self._sink = self._open_sink(sent, look)
        if self._sink is not None and has_news:
            self._sent = _hand_over(self._sink, sent, look.history)
            self._sink.flush()
            self._file.write(self._sent)
        return self._sent

    def close(self) -> None:
        """Close the sink, if one was opened."""
        if self._sink is not None:
            self._sink.close()


def _first_again(sent: Sent, history: RunHistory) -> int | None:
    """The first update that a later start ran again after it was sent; None without such a rewind."""
    return min((r.update for r in history.updates if r.incarnation > sent.incarnation and r.update <= sent.update), default=None)


def _updates(sent: Sent, history: RunHistory) -> list[UpdateRecord]:
    return [record for record in history.updates if record.update > sent.update]


def _evaluations(sent: Sent, history: RunHistory) -> list[EvaluationRecord]:
    """Those that were not sent, of versions that are on record as updates: so a rewind voids an evaluation with its update."""
    newest, gone = max((record.update for record in history.updates), default=0), set(sent.evaluations)
    is_begun = bool(history.updates)
    return [r for r in history.evaluations if is_begun and r.version <= newest and (r.version, r.directory) not in gone]


def _rewound(sink: Sink, sent: Sent, history: RunHistory) -> Sent:
    """Tell the sink of a rewind, if there was one; return what still counts as sent."""
    first = _first_again(sent, history)
    if first is None:
        return sent
    incarnation = max(record.incarnation for record in history.updates)
    again = sink.rewind(first, incarnation)
    last = [record for record in history.updates if record.update < again][-1:]
    return Sent(
        key=sent.key, update=last[0].update if last else 0, incarnation=last[0].incarnation if last else 0, rewound_by=incarnation,
        evaluations=tuple(item for item in sent.evaluations if again > 1 and item[0] < again),
    )  # fmt: skip


def _hand_over(sink: Sink, sent: Sent, history: RunHistory) -> Sent:
    """Send what is new; return what was sent by then."""
    sent = _rewound(sink, sent, history)
    for update in _updates(sent, history):
        sink.log(update.update, update.time_unix, update_scalars(update))
        sent = replace(sent, update=update.update, incarnation=update.incarnation)
    times = {record.update: record.time_unix for record in history.updates}
    for evaluation in _evaluations(sent, history):
        at = times.get(evaluation.version, min(times.values()))
        sink.log_evaluation(evaluation.version, at, evaluation_scalars(evaluation))
        sent = replace(sent, evaluations=(*sent.evaluations, (evaluation.version, evaluation.directory)))
    return sent


def open_follower(store: RunStore, name: str, section: SinksSection) -> Follower:
    """The follower of a run for one sink.

    Args:
        store: of the run directory.
        name: tensorboard or wandb.
        section: the recipe's [sinks], or what a command says instead.

    Raises:
        UserError: there is no run, or no such sink.
    """
    if not store.exists(paths.config_path(1)):
        raise UserError(f"sink: {store.url} holds no run (no config.i0001.json); name the --run-dir of a `flowfleet train`")
    first, tail = read_claim(store, 1), RunTail(store, at_once=None)
    name_of_run = str(first.config["run"]["name"])
    if name == "tensorboard":
        directory = tensorboard_directory(store, section, name_of_run)
        file = SentFile(RunStore(str(directory)), "flowfleet_sent.json", first.writer_id)  # it goes where the event files go
        return Follower(tail, file, lambda sent, look: TensorboardSink(directory, 0 if sent == Sent(key=sent.key) else sent.update + 1))
    if name == "wandb":
        folder, file = wandb_directory(store, section), SentFile(store, "reports/sinks/wandb.json", first.writer_id)
        return Follower(tail, file, lambda sent, look: WandbSink(
            section.wandb, RunIdentity(name=name_of_run, key=first.writer_id, config=look.claim.config), sent.rewound_by, folder
        ))  # fmt: skip
    raise UserError(f"sink: {name!r} is unknown; choose tensorboard or wandb")


def tensorboard_directory(store: RunStore, section: SinksSection, run_name: str) -> Path:
    """Where the event files of a run go: in a folder that runs may share, to a subfolder that is the run's alone."""
    root, shared = store.local_root, section.tensorboard.directory
    if root is not None and not shared:
        return root / "reports" / "tensorboard"
    return Path(shared or "tensorboard") / f"{run_name.replace('/', '_')}-{read_claim(store, 1).writer_id}"


def wandb_directory(store: RunStore, section: SinksSection) -> Path:
    """Where wandb keeps its files of a run."""
    if section.wandb.directory:
        return Path(section.wandb.directory)
    root = store.local_root
    return root / "reports" if root is not None else Path(".")


def follow(follower: Follower, every_s: float, ended: threading.Event) -> None:
    """Step until `ended` is set, then once more, and close. A store that is away is waited for until then."""
    is_last = False
    while True:
        try:
            follower.step()
        except CorruptFile:
            raise
        except StoreError as away:
            _log.warning("%s", away)
        if is_last:
            follower.close()
            return
        is_last = ended.wait(every_s)


def _hear_the_end(ended: threading.Event, finish_timeout_s: float) -> None:
    """Wait for the end of standard input; then see to it that this process ends, whatever the sink does."""
    while os.read(sys.stdin.fileno(), 4096):  # unbuffered: a reader's lock, held here, would abort an interpreter that ends
        pass
    ended.set()
    threading.Event().wait(finish_timeout_s)
    os._exit(EXIT_LATE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Follow one run for one sink; return the exit code. A sink's own exception passes: its last line is what the driver tells."""
    parser = argparse.ArgumentParser(prog="python -m deploy.sinks.follow")
    parser.add_argument("run")
    parser.add_argument("sink")
    parser.add_argument("section", help="[sinks] as JSON")
    given = parser.parse_args(arguments)
    configure_logging("WARNING")
    os.nice(NICENESS)
    section, ended = SinksSection.model_validate_json(given.section), threading.Event()
    threading.Thread(target=_hear_the_end, args=(ended, section.finish_timeout_s), daemon=True).start()
    try:
        follow(open_follower(RunStore(given.run), given.sink, section), section.every_s, ended)
    except FlowfleetError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
