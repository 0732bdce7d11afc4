"""What a report knows about a run, as read from its files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


class RunFiles(Protocol):
    """A run directory as the report sees it: `RunStore`, or a folder in a test."""

    def read(self, path: str) -> bytes:
        """Return a file's bytes; raises StoreError when it is missing."""
        ...

    def list(self, prefix: str = "") -> list[str]:
        """Return the sorted paths of all files under a folder."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSummary:
    """One reward over one update's images; None where nothing was scored."""

    mean: float | None
    std_in_group: float | None  # mean over groups
    coverage: float  # scored / asked
    flat_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRecord:
    """One metrics file."""

    update: int
    incarnation: int
    time_unix: float  # when the update ended
    seconds: Mapping[str, float]  # of the learner: wait, read, learn, save
    learner: Mapping[str, float]
    rewards: Mapping[str, RewardSummary]
    flat_group_share: float
    staleness: Mapping[int, int]  # updates -> groups
    drops: Mapping[str, int]  # reason -> groups
    images: int
    image_statistics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """One task of one frozen evaluation."""

    mean: float | None
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardResult:
    """One reward of one frozen evaluation."""

    mean: float | None  # unweighted over tasks
    tasks: Mapping[str, TaskResult]
    coverage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRow:
    """One evaluated image."""

    prompt_id: str
    text: str
    tag: str
    sheet: str  # path of the media file, relative to the run directory; "" when it is not there
    row: int
    scores: Mapping[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRecord:
    """One result.json."""

    directory: str
    version: int  # 0 = the base model
    snapshot: str
    digest: str  # of the protocol, as in the directory's name
    protocol: Mapping[str, Any]
    rewards: Mapping[str, RewardResult]
    rows: tuple[EvaluationRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSample:
    """One row of the last update's history."""

    update: int
    group: int
    sample_index: int
    prompt: str
    version: int
    staleness: int
    weighted_reward: float | None
    advantage: float
    scores: Mapping[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunHistory:
    """Everything that a report tells about a run; parts that do not exist yet are empty."""

    name: str
    config: Mapping[str, Any]
    config_digest: str
    environment: Mapping[str, Any]
    incarnations: int
    updates: tuple[UpdateRecord, ...]  # by update; of two incarnations the later one
    evaluations: tuple[EvaluationRecord, ...]  # of the one protocol that the report follows, by version
    num_other_evaluations: int  # under other protocols or snapshots
    last_samples: tuple[TrainSample, ...]  # of the newest update that has a history file

    @property
    def base(self) -> EvaluationRecord | None:
        """The base model's evaluation."""
        return self.evaluations[0] if self.evaluations and self.evaluations[0].version == 0 else None

    @property
    def newest(self) -> EvaluationRecord | None:
        """The newest evaluation after the base's."""
        return self.evaluations[-1] if self.evaluations and self.evaluations[-1].version > 0 else None

    @property
    def elapsed_s(self) -> tuple[float, ...]:
        """Running seconds at the end of each update: pauses between incarnations do not count, nor what came before the first update."""
        elapsed: list[float] = []
        for position, record in enumerate(self.updates):
            own = sum(record.seconds.values())
            before = self.updates[position - 1] if position else None
            if before is not None and before.incarnation == record.incarnation:
                own = max(record.time_unix - before.time_unix, 0.0)
            elapsed.append((elapsed[-1] if elapsed else 0.0) + own)
        return tuple(elapsed)

    def elapsed_at(self, version: int) -> float | None:
        """Running seconds when `version` was published; None when its metrics file is not there."""
        if version == 0:
            return 0.0
        for record, seconds in zip(self.updates, self.elapsed_s, strict=True):
            if record.update == version:
                return seconds
        return None
