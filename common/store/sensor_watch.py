"""SensorWatch: reads the metrics records of a running run, and what else its sensors need, a little at a time, and tells new alerts."""

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import CorruptFile
from common.logs import get_logger
from common.sensors import START, WATCHED, Alert, Band, Reading, Reference, judge, make_bands, newest, positions
from common.store import paths
from common.store.eval_results import read_result
from common.store.ledger_entries import RewardSpec
from common.store.media import read_statistics
from common.store.run_store import RunStore

MEMORY = 200  # newest readings that are kept beside the first START; alerts once told are kept whatever their age
FILES_A_LOOK = 16  # metrics files; and one sheet of the reference: the Coordinator's tick stays short
_log = get_logger("sensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRecord:
    """A metrics record that was read."""

    content: Mapping[str, Any]
    is_news: bool  # of this incarnation's work; else an earlier Coordinator saw it


class SensorWatch:
    """The sensors of one incarnation. One caller; its attributes without underscore may be read from other threads.

    Args:
        store: the run directory.
        directory: where the base's evaluation comes to lie; "" when there will be none.
        rewards: of the run.
        incarnation: whose metrics files are read from now on.
        finished: updates that were finished before this incarnation; their alerts are kept, not told again.
    """

    def __init__(self, store: RunStore, *, directory: str, rewards: Sequence[RewardSpec], incarnation: int, finished: int) -> None:
        self.alerts: tuple[Alert, ...] = ()
        self.positions: Mapping[str, float] = {}
        self.values: Mapping[str, float] = {}  # smoothed, those without a band too
        self.bands: Mapping[str, Band] = {}
        self._records: deque[ReadRecord] = deque()
        self._replayed: deque[str] = deque()  # metrics files of updates that were finished before this incarnation
        self._store, self._directory, self._incarnation = store, directory, incarnation
        self._train = tuple(reward.name for reward in rewards if reward.use == "train")
        self._watch = tuple(reward.name for reward in rewards if reward.use == "watch")
        self._restored = self._seen = finished
        self._is_begun = False
        self._pending: deque[str] = deque()  # metrics files to read
        self._readings: list[Reading] = []
        self._reference: Reference | None = None
        self._sheets: deque[str] | None = None  # of the reference, to read; None before its result is there
        self._values: dict[str, list[float]] = {}
        self._num_prompts = 0

    def look(self, finished: int) -> list[Alert]:
        """Read what is there of the reference and of the updates up to `finished`; return the alerts that are new.

        A damaged file is said in the log and left out. Raises StoreError when the store is away; the next look goes on.
        """
        if not self._is_begun:
            self._begin()
        fresh = self._read_reference()
        while self._replayed:
            self._load(self._replayed[0], is_news=True)
            self._replayed.popleft()
        self._pending.extend(paths.metrics_path(update, self._incarnation) for update in range(self._seen + 1, finished + 1))
        self._seen = max(self._seen, finished)
        for _ in range(min(FILES_A_LOOK, len(self._pending))):
            fresh = self._read_update(self._pending[0]) or fresh
            self._pending.popleft()
        return self._judge() if fresh else []

    def announced(self, update: int) -> None:
        """The learner finished an update. One that was finished before is replayed: its record is read, its images are judged already."""
        if update <= self._restored:
            self._replayed.append(paths.metrics_path(update, self._incarnation))

    def take_records(self) -> list[ReadRecord]:
        """The records that were read since the last call; the first one is the newest of those that earlier incarnations left."""
        return [self._records.popleft() for _ in range(len(self._records))]

    def _begin(self) -> None:
        """Queue what earlier incarnations left: the first updates and the newest ones, of two records the later one."""
        newest_paths: dict[int, str] = {}
        for path in self._store.list(paths.METRICS) if self._restored else ():
            found = paths.parse_metrics(path)
            if found is not None and found[0] <= self._restored:
                newest_paths[found[0]] = max(newest_paths.get(found[0], ""), path)
        updates = sorted(newest_paths)
        if updates:
            self._load(newest_paths[updates[-1]], is_news=False)
        kept = updates if len(updates) <= START + MEMORY else [*updates[:START], *updates[-MEMORY:]]
        self._pending.extend(newest_paths[update] for update in kept)
        self._is_begun = True
        if not self._directory:
            _log.info("the base model is not evaluated, so image statistics have no band; set evaluation.at_start = true")

    def _read_reference(self) -> bool:
        """Read the next sheet of the base's evaluation; whether that completed the reference."""
        if not self._directory or self._reference is not None:
            return False
        if self._sheets is None:
            if not self._store.exists(paths.result_path(self._directory)):
                return False
            self._sheets = deque(self._take_result())
        if self._sheets:
            self._add(_statistics(self._store, self._sheets[0]))
            self._sheets.popleft()
        if self._sheets:
            return False
        values = {name: np.array(found, dtype=np.float32) for name, found in self._values.items()}
        self._reference = Reference(num_prompts=self._num_prompts, values=values)
        return True

    def _take_result(self) -> list[str]:
        """Keep the watch rewards' values; return the sheets."""
        try:
            result = read_result(self._store, self._directory)
        except CorruptFile as error:
            _log.warning("no reference for the sensors: %s", error)
            return []
        self._num_prompts = len({row["prompt_id"] for row in result["rows"]})
        unknown = [name for name in self._watch if name not in result["rewards"]]
        if unknown:
            _log.info("watch rewards %s are not evaluated, so they have no band; add them to evaluation.rewards", ", ".join(unknown))
        for name in self._watch:
            found = [row["scores"].get(name) for row in result["rows"]]
            self._add({WATCHED + name: [value for value in found if value is not None]})
        leases = result.get("sheets", {})
        return [paths.sheet_path(self._directory, int(number), lease) for number, lease in sorted(leases.items()) if lease]

    def _add(self, values: Mapping[str, Sequence[float]]) -> None:
        for name, found in values.items():
            self._values.setdefault(name, []).extend(found)

    def _read_update(self, path: str) -> bool:
        """Take in an update's record; whether it was there and sound."""
        name = paths.parse_metrics(path)
        reading = self._load(path, is_news=True if name is not None and name[0] > self._restored else None)
        if reading is None:
            return False
        self._readings.append(reading)
        if len(self._readings) > START + MEMORY:
            del self._readings[START]
        return True

    def _load(self, path: str, *, is_news: bool | None) -> Reading | None:
        """Read a record, and keep it for `take_records` (None: not); None where it is missing or damaged."""
        if not self._store.exists(path):
            return None
        try:
            record = json.loads(self._store.read(path))
            reading = reading_of(record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            _log.warning("%s is no metrics record (%r); the sensors leave the update out", path, error)
            return None
        if is_news is not None:
            self._records.append(ReadRecord(content=record, is_news=is_news))
        return reading

    def _judge(self) -> list[Alert]:
        bands = make_bands(self._reference, self._readings, self._watch)
        self.bands, self.positions = bands, positions(self._readings, bands)
        self.values = newest(self._readings, self._sensors())
        known = {(alert.sensor, alert.update) for alert in self.alerts}
        found = [alert for alert in judge(self._readings, bands, self._train) if (alert.sensor, alert.update) not in known]
        self.alerts = (*self.alerts, *found)
        return [alert for alert in found if alert.update > self._restored]

    def _sensors(self) -> list[str]:
        """Every sensor that the newest reading could have measured."""
        return [*(self._readings[-1].statistics if self._readings else ()), *(WATCHED + name for name in self._watch)]


def _statistics(store: RunStore, path: str) -> dict[str, list[float]]:
    try:
        return {name: [float(value) for value in values] for name, values in read_statistics(store, path).items()}
    except CorruptFile as error:
        _log.warning("a sheet of the base's evaluation is left out of the sensors' reference: %s", error)
        return {}


def reading_of(record: Mapping[str, Any]) -> Reading:
    """Return what the sensors take of an update's metrics record. Raises KeyError, TypeError, ValueError for one that lacks it."""
    means = {name: summary["mean"] for name, summary in record["rewards"].items()}
    return Reading(
        update=int(record["update"]),
        num_groups=sum(int(count) for count in record["staleness"].values()),
        rewards={name: float(mean) for name, mean in means.items() if mean is not None},
        statistics={name: float(value) for name, value in record["image_statistics"].items() if value is not None},
    )
