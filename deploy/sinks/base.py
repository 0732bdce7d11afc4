"""What a sink is, and the scalars that it gets: the numbers of metrics/ and eval/ under names that read like paths."""

from collections.abc import Mapping
from typing import Protocol

from deploy.report.records import EvaluationRecord, UpdateRecord


class Sink(Protocol):
    """Takes a run's numbers. What it raises ends its follower's process, and nothing else."""

    def rewind(self, update: int, incarnation: int) -> int:
        """A resumed start runs `update` again: what was logged from there on is void. Returns the first update to be logged again."""
        ...

    def log(self, update: int, time_unix: float, scalars: Mapping[str, float]) -> None:
        """Take one update's scalars; called once an update, in order."""
        ...

    def log_evaluation(self, version: int, time_unix: float, scalars: Mapping[str, float]) -> None:
        """Take one frozen evaluation; its version was logged as an update before, but for version 0."""
        ...

    def flush(self) -> None:
        """Make what was logged durable, as far as the sink can."""
        ...

    def close(self) -> None:
        """Flush and let go."""
        ...


def update_scalars(record: UpdateRecord) -> dict[str, float]:
    """Name -> number of one metrics file; what it holds as null is left out."""
    scalars = {
        f"reward/{name}/{key}": value
        for name, summary in record.rewards.items()
        for key, value in (
            ("mean", summary.mean), ("std_in_group", summary.std_in_group), ("coverage", summary.coverage), ("flat_share", summary.flat_share),
        )
        if value is not None
    }  # fmt: skip
    scalars |= {f"learner/{name}": value for name, value in record.learner.items()}
    scalars |= {f"seconds/{name}": value for name, value in record.seconds.items()}
    scalars |= {f"images/{name}": value for name, value in record.image_statistics.items()}
    scalars |= {f"drops/{reason}": float(count) for reason, count in record.drops.items()}
    scalars |= {"pipeline/flat_group_share": record.flat_group_share, "pipeline/images": float(record.images)}
    groups = sum(record.staleness.values())
    if groups:
        scalars["pipeline/staleness"] = sum(age * count for age, count in record.staleness.items()) / groups
    return scalars


def evaluation_scalars(record: EvaluationRecord) -> dict[str, float]:
    """Name -> number of one frozen evaluation: evaluation/<reward>/all is the unweighted mean over tasks."""
    scalars: dict[str, float] = {}
    for name, result in record.rewards.items():
        means = {"all": result.mean, **{tag or "untagged": task.mean for tag, task in result.tasks.items()}}
        scalars |= {f"evaluation/{name}/{task}": mean for task, mean in means.items() if mean is not None}
        scalars[f"evaluation/{name}/coverage"] = result.coverage
    return scalars
