"""What a Coordinator of the store's fixtures shows at /metrics, read by name, and the learner's records that feed it."""

from collections.abc import Callable, Mapping
from typing import Any

from common.store import paths
from common.store.coordinator import Coordinator
from common.store.directive import Directive, FleetReport, SlotReport
from common.store.manifests import write_manifest
from common.store.run_store import RunStore
from common.types import Manifest, ManifestGroup, RolloutLease, Score, ScoreFile, ScoringLease
from tests.sensor_runs import record, write_record
from tests.store_fixtures import (
    write_scores,
)

GROUP = ManifestGroup(number=0, path="", media_path="", version=0, num_bytes=1, prompt_id="p", scores={}, kept=(True,))
Shown = Callable[..., float | None]


def shown(desk: Coordinator) -> Shown:
    """Reads a series' value: name without the prefix, labels besides run."""
    return lambda name, **labels: desk.metrics.registry.get_sample_value(f"flowfleet_{name}", {"run": "test", **labels})


def family(desk: Coordinator, name: str) -> dict[tuple[str, ...], float]:
    """Every series of a gauge or counter by its labels' values but run."""
    for found in desk.metrics.registry.collect():
        if name in (f"{found.name}".removeprefix("flowfleet_"), f"{found.name}_total".removeprefix("flowfleet_")):
            return {tuple(value for label, value in each.labels.items() if label != "run"): each.value for each in found.samples}
    raise AssertionError(name)


def learner_record(update: int, *, incarnation: int = 1, **learner: float | None) -> dict[str, Any]:
    """One metrics record of 16 images with these values of the learner."""
    tables = record(update, {"r": 0.25 * update}, {"brightness_mean": 0.5}, incarnation=incarnation)
    seconds = {"wait": 1.0, "read": 0.5, "learn": 4.0, "save": 0.25}
    steps = {"num_steps": 2.0, "num_skipped": 1.0}
    return tables | {"learner": {**steps, **learner}, "seconds": seconds, "weighted_reward": 0.75, "flat_group_share": 0.125}


def put_manifest(store: RunStore, update: int) -> None:
    write_manifest(store, Manifest(update=update, incarnation=1, config_digest="", max_staleness=1, groups=(GROUP,), drops=()))


def finish(store: RunStore, desk: Coordinator, update: int, tables: Mapping[str, Any]) -> None:
    """Write an update's record as the learner does, announce it, and let the Coordinator tick; its manifest where it has none."""
    if not store.exists(paths.manifest_path(update)):
        put_manifest(store, update)
    write_record(store, tables)
    desk.finish_update(update, {})
    desk.tick()


def leased(desk: Coordinator, slot: str = "rollout.0") -> RolloutLease:
    lease = desk.ask_rollout(slot)
    assert isinstance(lease, RolloutLease)
    return lease


def asked(desk: Coordinator, slot: str, reward: str) -> tuple[ScoringLease, ...]:
    leases = desk.ask_scoring(slot, reward, 9)
    assert isinstance(leases, tuple), leases
    return leases


def commit(store: RunStore, desk: Coordinator, lease: ScoringLease, scores: list[Score]) -> None:
    """Commit a score file twice, as a server whose first answer was lost."""
    file = ScoreFile(
        run="test", number=lease.number, lease_id=lease.group_lease_id, reward=lease.reward, scorer_version="1", scores=tuple(scores)
    )
    path = write_scores(store, file, directory=lease.directory)
    desk.commit_scores(lease.lease_id, path)
    desk.commit_scores(lease.lease_id, path)


def report(slots: Mapping[str, SlotReport], **sizes: int) -> Directive:
    return Directive(report=FleetReport(driver_process_id=1, sizes=sizes, slots=slots))
