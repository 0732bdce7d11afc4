"""Builds the learner from its config sections."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from common.fakes import FakeSpec
from common.heartbeat import Heartbeat, HeldLeases
from common.policy.base import Policy
from common.policy.config import ModelConfig
from common.policy.fake import FakePolicy
from common.policy.load import load_policy
from common.protocols import LearnerDesk
from common.store.faces import GroupFiles
from common.store.media import read_statistics
from common.store.run_store import STORE_PATIENCE_S, RunStore
from common.types import Manifest, Wait
from learner.archive import RunArchive
from learner.config import LearnerConfig
from learner.fake import FakeLearner
from learner.loop import follower_loop, learner_loop
from learner.publishing import Publisher
from learner.ranks import Ranks
from learner.state import StateArchive
from learner.update import Learner, make_learner
from learner.writer import InlineWriter, Writer


def load_learner_policy(model: ModelConfig, fake: FakeSpec | None = None) -> Policy:
    """Load what a learner in a process of its own needs: the transformer; text features come from the group files."""
    return load_policy(model, with_vae=False, with_text=False) if fake is None else FakePolicy()


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
    fake: FakeSpec | None = None  # a fake engine instead of the model


def _make_learner(settings: LearnerSettings, policy: Policy, pause: Callable[[float], None]) -> Learner:
    if settings.fake is None:
        return make_learner(policy, settings.learner, settings.weights, settings.run_seed, base_dtype=settings.model.dtype)
    seconds = settings.fake.seconds_of("learner")
    return FakeLearner(policy, settings.learner, weights=settings.weights, run_seed=settings.run_seed, seconds=seconds, pause=pause)


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

    def __init__(
        self, settings: LearnerSettings, desk: LearnerDesk, policy: Policy | None = None, *,
        writer: Writer | None = None, pause: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        """Prepare a learner.

        Args:
            policy: lent to it; without one it loads the whole model, for the others of its process too (--local).
            writer: of an update's files; the loop itself (InlineWriter) when absent.
            pause: how a fake engine spends its seconds; a simulation passes its own.

        Raises:
            ModelError, ConfigError: what loading finds.
        """
        store = RunStore(settings.store_url, patience_s=STORE_PATIENCE_S)
        self.policy = policy or (load_policy(settings.model) if settings.fake is None else FakePolicy())
        self._desk, self._source = desk, GroupFiles(store)
        self._learner = _make_learner(settings, self.policy, pause)
        publisher = Publisher(store, incarnation=settings.incarnation, snapshots=settings.snapshots)
        self._archive = RunArchive(store, settings.learner, publisher, incarnation=settings.incarnation, statistics=MediaStatistics(store))
        self._states = StateArchive(store, states_kept=settings.learner.states_kept, writer_id="follower")
        self._writer: Writer = writer or InlineWriter()
        self.gauges = self._learner.gauges

    def join(self, ranks: Ranks) -> None:
        """Share every minibatch with other ranks from now on."""
        self._learner.ranks = ranks

    def loop(self) -> Iterator[Wait]:
        """Return the learner's loop for a caller that drives it: alone, or as rank 0."""
        with closing(self._writer) as writer:
            yield from learner_loop(self._learner, self._desk, self._source, self._archive, writer=writer)

    def follow(self) -> Iterator[Wait]:
        """Return the loop of the other ranks."""
        return follower_loop(self._learner, self._source, self._states)

    def heartbeat(self, *, retry_on: tuple[type[Exception], ...] = ()) -> Heartbeat:
        """Return a heartbeat that shows the learner alive."""
        return Heartbeat("learner", self._desk, HeldLeases(), self.gauges.snapshot, retry_on=retry_on)
