"""Builds the learner from its config sections."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from common.gauges import Gauges
from common.heartbeat import Heartbeat, HeldLeases
from common.policy.base import Policy
from common.policy.config import ModelConfig
from common.policy.load import load_policy
from common.protocols import LearnerDesk
from common.store.faces import GroupFiles
from common.store.media import read_statistics
from common.store.run_store import RunStore
from common.types import Manifest, Wait
from learner.archive import RunArchive
from learner.config import LearnerConfig
from learner.loop import learner_loop
from learner.publishing import Publisher
from learner.update import make_learner


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSettings:
    """All that a learner is made from; plain config, so it crosses process borders."""

    store_url: str
    run_seed: int
    incarnation: int
    model: ModelConfig
    learner: LearnerConfig
    weights: Mapping[str, float]  # train reward -> weight
    snapshots: tuple[str, ...]  # that rollouts and evaluation use: those are published


class MediaStatistics:
    """Mean image statistics of a manifest's groups, from their media files."""

    def __init__(self, store: RunStore) -> None:
        self._store = store

    def read(self, manifest: Manifest) -> Mapping[str, float]:
        """Return name -> mean over all images."""
        tables = [read_statistics(self._store, group.media_path) for group in manifest.groups]
        return {name: float(np.mean([table[name].mean() for table in tables])) for name in tables[0]}


class LearnerProcess:
    """The learner with its loop, for an actor or for --local."""

    def __init__(self, settings: LearnerSettings, desk: LearnerDesk, policy: Policy | None = None) -> None:
        """Load a policy of its own unless one is lent (--local). Raises ModelError, ConfigError."""
        store = RunStore(settings.store_url)
        self.policy = policy or load_policy(settings.model)
        self._desk, self._source = desk, GroupFiles(store)
        self._learner = make_learner(
            self.policy, settings.learner, settings.weights, settings.run_seed, base_dtype=settings.model.dtype
        )  # fmt: skip
        publisher = Publisher(store, incarnation=settings.incarnation, snapshots=settings.snapshots)
        self._archive = RunArchive(store, settings.learner, publisher, incarnation=settings.incarnation, statistics=MediaStatistics(store))
        self.gauges = Gauges()

    def loop(self) -> Iterator[Wait]:
        """Return the learner's loop for a caller that drives it."""
        return learner_loop(self._learner, self._desk, self._source, self._archive)

    def heartbeat(self, *, retry_on: tuple[type[Exception], ...] = ()) -> Heartbeat:
        """Return a heartbeat that shows the learner alive."""
        return Heartbeat("learner", self._desk, HeldLeases(), self.gauges.snapshot, retry_on=retry_on)
