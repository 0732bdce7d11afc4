"""A run followed by its files: each look reads only what is new. What `flowfleet watch` and the sinks see of a run.

Read are status.json, the newest start's config, metrics/ and the results of eval/; groups, scores and images never. Committed files do not
change, so each is read once. metrics/ is listed when status.json tells of a version whose metrics are not here yet, and every REPLAY_LIST_S
while the newest start, which may run updates again, has none of that version; eval/ at most every EVAL_LIST_S: a look at a quiet run
costs three small questions to the store.
"""

import calendar
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from common.errors import UserError
from common.store import paths
from common.store.claim import FRESH_S
from common.store.manifests import Claim, Status, encode_record, read_claim, read_status
from common.store.run_store import RunStore
from deploy.report.reader import read_history
from deploy.report.records import RunHistory

EVAL_LIST_S = 10.0
REPLAY_LIST_S = EVAL_LIST_S
METRICS_A_LOOK = 256  # files; the newest first, so that a long run far away is seen at once
NameList = list[str]  # KnownFiles.list hides the builtin inside the class


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What one look at a run found."""

    history: RunHistory  # updates that a rewind took back are not in it; evaluations have no rows
    status: Status | None  # None: nobody has written one yet
    claim: Claim  # of the newest start
    silent_s: float  # since somebody wrote status.json
    num_unread: int  # metrics files left for further looks

    @property
    def is_starting(self) -> bool:
        """Whether the newest start has not begun to work."""
        return self.status is None or self.status.incarnation < self.claim.incarnation

    @property
    def is_over(self) -> bool:
        """Whether status.json says that nobody runs the newest start any more."""
        return self.status is not None and not self.is_starting and self.status.state != "running"

    @property
    def is_silent(self) -> bool:
        """Whether status.json says running, and nobody writes it."""
        return self.status is not None and self.status.state == "running" and self.silent_s > FRESH_S

    @property
    def num_updates(self) -> int:
        """schedule.num_updates of the newest start."""
        return int(self.claim.config["schedule"]["num_updates"])

    @property
    def time_is_up_at(self) -> float | None:
        """When the newest start's time limit passes, in unix seconds; None without one."""
        limit_s = self.claim.config["schedule"].get("time_limit_s")
        if limit_s is None:
            return None
        return calendar.timegm(time.strptime(self.claim.started_at, "%Y-%m-%dT%H:%M:%SZ")) + float(limit_s)

    @property
    def is_finished(self) -> bool:
        """Whether it is over and went as far as it was meant to: all updates, or its time."""
        if not self.is_over or self.status is None:
            return False
        end = self.time_is_up_at
        return self.status.state == "done" or (end is not None and self.status.written_at >= end)


class KnownFiles:
    """The files that were read, as the report's reader sees a run directory."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}

    def read(self, path: str) -> bytes:
        """Return a file's bytes."""
        return self.contents[path]

    def list(self, prefix: str = "") -> NameList:
        """Return the sorted paths."""
        return sorted(path for path in self.contents if path.startswith(prefix))


def surviving(metrics: Iterable[str]) -> set[str]:
    """The metrics files that count: a start that resumed at update m takes back what earlier starts did from m on.

    Args:
        metrics: paths of metrics files.
    """
    named = {path: found for path in metrics if (found := paths.parse_metrics(path)) is not None}
    begins: dict[int, int] = {}
    for update, incarnation in named.values():
        begins[incarnation] = min(update, begins.get(incarnation, update))
    return {
        path
        for path, (update, incarnation) in named.items()
        if not any(later > incarnation and begin <= update for later, begin in begins.items())
    }


class RunTail:
    """Follows one run.

    Args:
        store: of the run directory.
        clock, wall: monotonic and wall time, in seconds.
        at_once: metrics files that one look reads at most; None: all.
    """

    def __init__(
        self, store: RunStore, *, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time,
        at_once: int | None = METRICS_A_LOOK,
    ) -> None:  # fmt: skip
        self._store, self._clock, self._wall, self._at_once = store, clock, wall, at_once
        self._claim: Claim | None = None
        self._known = KnownFiles()
        self._history: RunHistory | None = None
        self._history_of: frozenset[str] = frozenset()  # the files that it was made of
        self._metrics: set[str] = set()  # every name that was listed
        self._surviving: set[str] = set()
        self._newest = -1  # update that has metrics
        self._listed_for = 0  # incarnation for which metrics/ was listed
        self._own_newest = -1  # its newest update that has metrics
        self._listed_at = float("-inf")
        self._eval_listed_at = float("-inf")
        self._sign: tuple[int, int] | None = None  # the status that was seen last: incarnation, sequence
        self._sign_at = 0.0

    def look(self) -> Look:
        """Read what is new.

        Raises:
            UserError: there is no run.
            CorruptFile: a file that is there breaks its form.
            StoreError: the store is away; look again.
        """
        status = read_status(self._store)
        claim = self._newest_claim(status)
        is_over = status is not None and status.state != "running"
        self._list_metrics(claim, status, is_over=is_over)
        num_unread = self._read_metrics()
        if is_over or self._clock() - self._eval_listed_at >= EVAL_LIST_S:
            self._read_results()
        known = frozenset(self._known.contents)
        if self._history is None or known != self._history_of:
            self._history, self._history_of = read_history(self._known), known
        return Look(history=self._history, status=status, claim=claim, silent_s=self._silence(status), num_unread=num_unread)

    def _newest_claim(self, status: Status | None) -> Claim:
        """The newest start, found without listing the run directory: starts are numbered from 1 on."""
        number = max(self._claim.incarnation if self._claim else 0, status.incarnation if status else 0)
        while self._store.exists(paths.config_path(number + 1)):
            number += 1
        if number == 0:
            raise UserError(f"{self._store.url} holds no run (no config.i0001.json); name the --run-dir of a `flowfleet train`")
        if self._claim is None or self._claim.incarnation != number:
            self._claim = read_claim(self._store, number)
            self._known.contents[paths.config_path(number)] = encode_record(self._claim)
        return self._claim

    def _list_metrics(self, claim: Claim, status: Status | None, *, is_over: bool) -> None:
        is_behind = status is not None and self._newest < status.version
        may_replay = status is not None and self._own_newest < status.version and self._clock() - self._listed_at >= REPLAY_LIST_S
        if not (is_behind or is_over or may_replay or self._listed_for != claim.incarnation):
            return
        listed = self._store.list(paths.METRICS)
        self._listed_for, self._listed_at = claim.incarnation, self._clock()
        named = {path: found for path in listed if (found := paths.parse_metrics(path)) is not None}
        self._metrics, self._surviving = set(named), surviving(named)
        self._own_newest = max((update for update, incarnation in named.values() if incarnation == claim.incarnation), default=-1)
        for path in [path for path in self._known.contents if path in self._metrics - self._surviving]:
            del self._known.contents[path]

    def _read_metrics(self) -> int:
        """Read the newest files that are not known; return how many are left."""
        unread = sorted(self._surviving - self._known.contents.keys(), reverse=True)
        for path in unread[: self._at_once]:
            self._known.contents[path] = self._store.read(path)
        updates = [found[0] for path in self._surviving if (found := paths.parse_metrics(path)) is not None]
        self._newest = max(updates, default=-1)
        return len(unread[self._at_once :]) if self._at_once is not None else 0

    def _read_results(self) -> None:
        self._eval_listed_at = self._clock()
        for path in self._store.list(paths.EVAL):
            if path.endswith("/result.json") and path not in self._known.contents:
                self._known.contents[path] = _without_rows(self._store.read(path))

    def _silence(self, status: Status | None) -> float:
        """Seconds since status.json was written: by this clock once a change was seen, by the wall clocks until then."""
        if status is None:
            return 0.0
        sign, now = (status.incarnation, status.sequence), self._clock()
        if self._sign is None:
            self._sign, self._sign_at = sign, now - max(0.0, self._wall() - status.written_at)
        elif self._sign != sign:
            self._sign, self._sign_at = sign, now
        return now - self._sign_at


def _without_rows(content: bytes) -> bytes:
    """A result without its images' rows, which no look needs; what is no result stays as it is, for the reader to refuse."""
    try:
        tables = json.loads(content)
    except ValueError:
        return content
    if not isinstance(tables, Mapping) or not {"rows", "sheets"} <= tables.keys():
        return content
    return json.dumps({**tables, "rows": [], "sheets": {}}).encode()
