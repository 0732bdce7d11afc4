"""A run that is looked at while it goes on: its state at a glance, its curves, and its report in parts that are drawn anew when files came."""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from common.errors import StoreError
from common.store.claim import FRESH_S
from common.store.manifests import Status, read_status
from common.store.run_store import RunStore
from deploy.report.live_files import LinkedShelf, LiveFiles
from deploy.report.page import PARTS, PageParts, render_parts
from deploy.report.reader import read_history
from deploy.report.records import RunHistory
from deploy.report.steps import step_curves
from deploy.report.verdict import duration

LOOK_S = 1.5  # looks inside this time are one look, however many pages are open
REST_S = 5.0  # at least between two drawings
REST_TIMES = 4.0  # of a drawing's duration: it takes a fifth of one core at most
MAX_VERSIONS = 100  # under the slider: images are links, so the page stays small
RECENT_UPDATES = 20  # that the time to go is told from
_DRAWING_FAILED = "the drawing failed; the server's terminal says why"


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveState:
    """The content of /api/state.json."""

    name: str
    state: str  # waiting | running | silent | done | stopped
    sentence: str  # state and update, for people
    update: int  # newest finished
    planned: int | None
    share: float | None  # of the updates
    version: int | None  # newest evaluated
    update_age_s: float | None  # since the newest update ended
    status_age_s: float | None  # since the last sign of life
    left_s: float | None  # to go, from the last updates' pace
    alerts: tuple[str, ...]
    trouble: str  # why the page is not refreshed, "" when it is
    is_behind: bool  # files came that are not drawn yet
    parts: Mapping[str, str]  # name -> digest


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnPage:
    """A drawing and the files that it shows."""

    page: PageParts
    digests: Mapping[str, str]
    files: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """What one look found."""

    at: float
    files: frozenset[str]
    history: RunHistory
    status: Status | None


class LiveRun:
    """One run directory under observation; safe to ask from several threads. Nothing is done while nobody asks, and nothing is written.

    Args:
        store: the run directory.
        clock: for durations.
        wall: for ages of what the run's files date.
        niceness: of the thread that draws, so that a run on the same machine comes first.

    Raises:
        StoreError: the store refused.
    """

    def __init__(
        self, store: RunStore, *, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time, niceness: int = 0
    ) -> None:
        self._store, self._clock, self._wall, self._niceness = store, clock, wall, niceness
        self._files = LiveFiles(store)
        self._shelf = LinkedShelf(self._files)
        self._looking, self._lock = threading.Lock(), threading.Lock()
        self._seen: _Look | None = None
        self._drawn: DrawnPage | None = None
        self._drawing: threading.Thread | None = None
        self._trouble, self._rest_until = "", float("-inf")

    @property
    def drawn(self) -> DrawnPage | None:
        """The newest drawing; None before the first."""
        return self._drawn

    @property
    def trouble(self) -> str:
        """Why the last drawing failed, "" when it did not."""
        return self._trouble

    def state(self) -> LiveState:
        """Look, ask for a drawing if something came, and tell. Raises StoreError, CorruptFile among them."""
        found = self._look()
        self._ask_for_drawing(found)
        drawn = self._drawn
        is_behind = drawn is None or drawn.files != found.files
        return _told(found, self._wall(), trouble=self._trouble, is_behind=is_behind, parts={} if drawn is None else drawn.digests)

    def curves(self) -> dict[str, Any]:
        """The step-exact curves as of now. Raises StoreError, CorruptFile among them."""
        return step_curves(self._look().history)

    def image(self, link: str) -> bytes | None:
        """A linked image as WebP; None when no page linked it. Raises StoreError, CorruptFile among them."""
        return self._shelf.image(link)

    def _look(self) -> _Look:
        with self._looking:
            before = self._seen
            if before is not None and self._clock() - before.at < LOOK_S:
                return before
            files = self._files.look()
            history = before.history if before is not None and before.files == files else read_history(self._files)
            self._seen = _Look(at=self._clock(), files=files, history=history, status=read_status(self._store))
            return self._seen

    def _ask_for_drawing(self, found: _Look) -> None:
        """Draw in a thread of its own, one at a time, resting in between."""
        with self._lock:
            is_busy = self._drawing is not None and self._drawing.is_alive()
            is_new = self._drawn is None or self._drawn.files != found.files
            if is_busy or not is_new or self._clock() < self._rest_until:
                return
            self._drawing = threading.Thread(target=self._draw, args=(found,), name="drawing", daemon=True)
            self._drawing.start()

    def _draw(self, found: _Look) -> None:
        started, trouble = self._clock(), _DRAWING_FAILED
        os.setpriority(os.PRIO_PROCESS, 0, max(self._niceness, os.getpriority(os.PRIO_PROCESS, 0)))  # of this thread, on Linux
        try:
            page = render_parts(found.history, self._shelf, max_versions=MAX_VERSIONS)
            digests = {name: hashlib.sha256(page.parts[name].encode()).hexdigest()[:16] for name in PARTS}
            self._drawn = DrawnPage(page=page, digests=digests, files=found.files)
            trouble = ""
        except StoreError as error:  # a file retired meanwhile, or is corrupt: the next look tries again
            trouble = str(error)
        finally:
            self._trouble = trouble
            self._rest_until = self._clock() + max(REST_S, REST_TIMES * (self._clock() - started))


def as_json(state: LiveState) -> dict[str, Any]:
    """The state as /api/state.json has it."""
    return asdict(state)


def _told(found: _Look, now: float, *, trouble: str, is_behind: bool, parts: Mapping[str, str]) -> LiveState:
    history, status = found.history, found.status
    pace = _pace(history)
    newest = history.updates[-1] if history.updates else None
    status_age_s = None if status is None else max(now - status.written_at, 0.0)
    state = _state(status, status_age_s)
    return LiveState(
        name=history.name,
        state=state,
        sentence=_sentence(state, status, pace),
        update=pace.update,
        planned=pace.planned,
        share=pace.share,
        version=history.evaluations[-1].version if history.evaluations else None,
        update_age_s=None if newest is None else max(now - newest.time_unix, 0.0),
        status_age_s=status_age_s,
        left_s=pace.left_s if state == "running" else None,
        alerts=() if status is None else status.alerts,
        trouble=trouble,
        is_behind=is_behind,
        parts=dict(parts),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pace:
    """How far a run is."""

    update: int  # newest finished
    planned: int | None
    limit_s: float | None  # of the newest start, where the time limit comes before the planned updates
    spent_s: float  # by the newest start
    share: float | None
    left_s: float | None


def _pace(history: RunHistory) -> _Pace:
    """By updates, or by the time limit when that comes first: updates to go times the last ones' median duration against the limit's rest."""
    schedule = history.config.get("schedule", {})
    planned, limit_s = schedule.get("num_updates"), schedule.get("time_limit_s")
    update = history.updates[-1].update if history.updates else 0
    own = [record for record in history.updates if record.incarnation == history.updates[-1].incarnation]
    spent_s = own[-1].time_unix - own[0].time_unix + sum(own[0].seconds.values()) if own else 0.0
    spans = [after.time_unix - before.time_unix for before, after in pairwise(own[-RECENT_UPDATES - 1 :])]
    left_s = max(planned - update, 0) * median(spans) if planned and spans else None
    if limit_s is not None and (left_s is None or limit_s - spent_s < left_s):
        rest_s = max(limit_s - spent_s, 0.0)
        return _Pace(update=update, planned=planned, limit_s=limit_s, spent_s=spent_s, share=min(spent_s / limit_s, 1.0), left_s=rest_s)
    share = min(update / planned, 1.0) if planned else None
    return _Pace(update=update, planned=planned, limit_s=None, spent_s=spent_s, share=share, left_s=left_s)


def _state(status: Status | None, age_s: float | None) -> str:
    if status is None or age_s is None:
        return "waiting"
    return "silent" if status.state == "running" and age_s > FRESH_S else status.state


def _sentence(state: str, status: Status | None, pace: _Pace) -> str:
    words = [state if status is None or not status.reason else f"{state}: {status.reason}"]
    words.append(f"update {pace.update:,}" + (f" of {pace.planned:,}" if pace.planned and pace.limit_s is None else ""))
    if pace.limit_s is not None:
        words.append(f"{duration(pace.spent_s)} of {duration(pace.limit_s)}")
    if status is not None and status.alerts:
        words.append(f"{len(status.alerts)} alert{'' if len(status.alerts) == 1 else 's'}")
    return " · ".join(words)
