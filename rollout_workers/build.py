"""Builds a rollout worker from its config sections, for an actor (a policy of its own) or for --local (a shared one)."""

import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

from common.fakes import FakeSpec
from common.gauges import Gauges
from common.heartbeat import Heartbeat, HeldLeases
from common.policy.adapters import read_adapter
from common.policy.base import AdapterState, Policy
from common.policy.config import ModelConfig
from common.policy.fake import FakePolicy
from common.policy.load import load_policy
from common.protocols import RolloutDesk
from common.store.config import EvaluationConfig
from common.store.faces import GroupFiles
from common.store.run_store import RunStore
from common.types import FloatArray, MediaBatch, Publication
from rollout_workers.config import RolloutConfig
from rollout_workers.delivery import Delivery, InlineExecutor
from rollout_workers.fake import FakeStudio
from rollout_workers.media import decode_media
from rollout_workers.studio import Studio
from rollout_workers.weights import BorrowedWeights, WeightKeeper, Weights
from rollout_workers.worker import LeaseSampler, RolloutWorker


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """All that a rollout worker is made from; plain config sections, so it crosses process borders."""

    slot: str  # the worker's name: rollout.0 ...
    store_url: str
    run: str
    run_seed: int
    model: ModelConfig
    rollout: RolloutConfig
    evaluation: EvaluationConfig
    keeps_negative: bool = False  # text features of the empty prompt go into the group file though sampling is unguided
    fake: FakeSpec | None = None  # a fake engine instead of the model


def adapter_loader(store: RunStore) -> Callable[[Publication, str], AdapterState]:
    """Return what reads one snapshot of a published file from the run directory."""
    return lambda publication, snapshot: read_adapter(store.read(publication.path), snapshot)


def build_worker(settings: WorkerSettings, desk: RolloutDesk, *, retry_on: tuple[type[Exception], ...] = ()) -> RolloutWorker:
    """Return a worker with a policy of its own, a background thread for decoding and commits, and a heartbeat.

    Raises:
        ModelError, ConfigError: the model directory or the sampler's settings are wrong.
    """
    policy: Policy = load_policy(settings.model) if settings.fake is None else FakePolicy()
    store = RunStore(settings.store_url)
    held, gauges = HeldLeases(), Gauges()
    weights: Weights = WeightKeeper(policy, adapter_loader(store))
    heartbeat = Heartbeat(settings.slot, desk, held, gauges.snapshot, retry_on=retry_on)
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"deliver-{settings.slot}")
    return _assemble(settings, desk, policy, store, weights=weights, executor=executor, held=held, gauges=gauges, heartbeat=heartbeat)


def build_local_worker(
    settings: WorkerSettings, desk: RolloutDesk, policy: Policy, store: RunStore, *, pause: Callable[[float], None] = time.sleep
) -> RolloutWorker:
    """Return a worker that borrows the learner's policy and does everything in the caller's thread (--local).

    pause: how a fake engine spends its seconds; a simulation passes its own.
    """
    weights: Weights = BorrowedWeights(policy, adapter_loader(store))
    return _assemble(
        settings, desk, policy, store, weights=weights, executor=InlineExecutor(), held=HeldLeases(), gauges=Gauges(), heartbeat=None,
        pause=pause,
    )  # fmt: skip


def _assemble(
    settings: WorkerSettings, desk: RolloutDesk, policy: Policy, store: RunStore, *,
    weights: Weights, executor: Executor, held: HeldLeases, gauges: Gauges, heartbeat: Heartbeat | None,
    pause: Callable[[float], None] = time.sleep,
) -> RolloutWorker:  # fmt: skip
    def decode(final_latents: FloatArray) -> MediaBatch:
        return decode_media(policy, final_latents, settings.rollout.micro_batch)

    studio = _studio(settings, policy, pause)
    delivery = Delivery(desk, GroupFiles(store), decode, executor, held=held, gauges=gauges)
    return RolloutWorker(settings.slot, desk, weights, studio, delivery, held=held, gauges=gauges, heartbeat=heartbeat)


def _studio(settings: WorkerSettings, policy: Policy, pause: Callable[[float], None]) -> LeaseSampler:
    if settings.fake is None:
        return Studio(
            policy,
            settings.rollout,
            settings.evaluation,
            run=settings.run,
            run_seed=settings.run_seed,
            keeps_negative=settings.keeps_negative,
        )
    seconds = settings.fake.seconds_of(settings.slot)
    return FakeStudio(policy, settings.rollout, run=settings.run, run_seed=settings.run_seed, seconds=seconds, pause=pause)
