"""Small groups, settings and a scripted run for the store's tests."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from common.policy.adapters import write_adapter_bytes
from common.store import paths
from common.store.config import EvaluationConfig, ScheduleConfig, StoreConfig
from common.store.coordinator import Coordinator, CoordinatorSettings
from common.store.evaluations import EvalProtocol
from common.store.groups import write_group, write_media_sheet, write_scores
from common.store.ledger_entries import RewardSpec
from common.store.prompts_order import PromptOrder
from common.store.run_store import RunStore
from common.types import (
    AdapterId,
    LeaseKind,
    Manifest,
    MediaBatch,
    Prompt,
    PromptFeatures,
    Publication,
    RolloutGroup,
    RolloutLease,
    SamplerSpec,
    Score,
    ScoreFile,
    ScoringLease,
    SnapshotInfo,
    Stop,
    Trajectory,
    Wait,
)

PROMPTS = tuple(Prompt(id=f"p{index}", text=f"picture {index}", metadata={"tag": "ab"[index % 2]}) for index in range(5))


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_group(
    number: int = 7, lease_id: str = "ab12", *, num_samples: int = 4, num_steps: int = 2, version: int = 0, digest: str = "d",
    prompt: Prompt | None = None, with_negative: bool = False,
) -> RolloutGroup:  # fmt: skip
    """A group of random numbers, W = num_steps, L = num_steps + 1 (0 without steps), C h w = 2 3 4."""
    draw = np.random.default_rng(number)
    num_latents = num_steps + 1 if num_steps else 0
    trajectories = tuple(
        Trajectory(
            sample_index=index, seed=2**62 + index, step_index=np.arange(num_steps, dtype=np.int16),
            timestep=draw.random(num_steps, np.float32), sigma=draw.random(num_steps, np.float32),
            next_sigma=draw.random(num_steps, np.float32), latents=draw.random((num_latents, 2, 3, 4), np.float32),
            latent_index=np.arange(num_latents, dtype=np.int16), behavior_log_prob=-draw.random(num_steps, np.float32),
            final_latents=draw.random((2, 3, 4), np.float32), media_row=index,
        )
        for index in range(num_samples)
    )  # fmt: skip
    embeds, pooled = draw.random((5, 6), np.float32), draw.random(4, np.float32)
    negative = {"negative_embeds": -embeds, "negative_pooled": -pooled} if with_negative else {}
    features = PromptFeatures(prompt_embeds=embeds, pooled=pooled, **negative)
    sampler = SamplerSpec(
        kernel="flow_sde", noise_level=0.7, num_steps=6, guidance_scale=1.0, height=8, width=8, snapshot="live",
        window=tuple(range(num_steps)), shared_init=True,
    )  # fmt: skip
    return RolloutGroup(
        run="test", number=number, lease_id=lease_id, prompt=prompt or PROMPTS[0],
        adapter=AdapterId(incarnation=1, version=version, digest=digest), sampler=sampler, seconds=1.5, features=features,
        trajectories=trajectories,
    )  # fmt: skip


def make_media(num_images: int = 4) -> MediaBatch:
    """Random images, 8 x 8."""
    images = np.random.default_rng(num_images).integers(0, 256, (num_images, 8, 8, 3), dtype=np.uint8)
    return MediaBatch(images=images, statistics={"brightness": images.mean(axis=(1, 2, 3)).astype(np.float32)})


def make_settings(
    *, num_updates: int = 3, max_staleness: int = 1, every: int = 0, rewards: tuple[RewardSpec, ...] | None = None,
    eval_prompts: tuple[Prompt, ...] = (), **schedule: Any,
) -> CoordinatorSettings:  # fmt: skip
    """P = 2, K = 4, one train reward "r" by default."""
    specs = rewards or (RewardSpec(name="r"),)
    evaluation = EvaluationConfig(every=every, sheet_size=2)
    return CoordinatorSettings(
        run="test", config_digest="c0", schedule=ScheduleConfig(num_updates=num_updates, max_staleness=max_staleness, **schedule),
        store=StoreConfig(), groups_per_update=2, group_size=4, rollout_snapshot="live", rewards=specs,
        protocol=EvalProtocol(config=evaluation, prompts=eval_prompts, rewards=specs),
    )  # fmt: skip


def make_coordinator(store: RunStore, settings: CoordinatorSettings, clock: Clock, *, incarnation: int = 1, **options: Any) -> Coordinator:
    """A Coordinator over the fixture's prompts."""
    return Coordinator(store, settings, incarnation=incarnation, prompt_for=PromptOrder(PROMPTS, 3), clock=clock, **options)


def publish(store: RunStore, desk: Coordinator, version: int, *, incarnation: int = 1) -> Publication:
    """Write a real adapter file and announce it."""
    live, ema = ({"lora.weight": torch.full((2, 2), version + shift)} for shift in (0.0, 0.5))
    infos = {"live": SnapshotInfo(num_modules=1, canary=0.1), "ema": SnapshotInfo(num_modules=1, canary=0.05)}
    content, adapter = write_adapter_bytes({"live": live, "ema": ema}, infos, incarnation=incarnation, version=version)
    path = paths.adapter_path(incarnation, version)
    store.create_exclusive(path, content, writer_id="learner")
    publication = Publication(adapter=adapter, path=path, snapshots=infos)
    desk.publish(publication)
    return publication


def write_state(store: RunStore, update: int) -> None:
    """A complete LearnerState."""
    content = f"state {update}".encode()
    store.create_exclusive(f"{paths.learner_directory(update)}/state.safetensors", content, writer_id="learner")
    told = {"file": "state.safetensors", "sha256": hashlib.sha256(content).hexdigest(), "update": update}
    store.create_exclusive(paths.learner_complete_path(update), json.dumps(told).encode(), writer_id="learner")


def roll_out(store: RunStore, desk: Coordinator, lease: RolloutLease) -> None:
    """Make and commit what a lease asks for."""
    if lease.kind is LeaseKind.EVAL:
        desk.commit_rollout(lease.lease_id, write_media_sheet(store, lease, make_media(len(lease.prompts))), 1.0)
        return
    adapter = lease.publication.adapter
    group = make_group(lease.number, lease.lease_id, version=adapter.version, digest=adapter.digest, prompt=lease.prompts[0])
    desk.commit_rollout(lease.lease_id, write_group(store, group, make_media()), 1.0)


def score(store: RunStore, desk: Coordinator, lease: ScoringLease, *, base: float = 0.0, num_null: int = 0) -> None:
    """Score image i with base + i / 8; the first `num_null` are null."""
    scores = tuple(
        Score(sample_index=i, value=None if i < num_null else base + i / 8, error="engine died" if i < num_null else "")
        for i in range(len(lease.prompts))
    )
    file = ScoreFile(run="test", number=lease.number, lease_id=lease.group_lease_id, reward=lease.reward, scorer_version="1", scores=scores)
    desk.commit_scores(lease.lease_id, write_scores(store, file, directory=lease.directory))


def work(store: RunStore, desk: Coordinator, reward: str = "r") -> Iterator[RolloutLease | ScoringLease]:
    """Roll out and score all that may be done now."""
    while True:
        lease = desk.ask_rollout("rollout.0")
        if not isinstance(lease, Wait | Stop):
            roll_out(store, desk, lease)
            yield lease
            continue
        scoring = desk.ask_scoring("reward.r.0", reward, 4)
        if isinstance(scoring, Wait | Stop):
            return
        for each in scoring:
            score(store, desk, each)
            yield each


def learn(store: RunStore, desk: Coordinator, update: int, *, incarnation: int = 1, saves_state: bool = True) -> Manifest:
    """Consume the manifest of an update that is ready, and publish."""
    manifest = desk.next_manifest(update)
    assert isinstance(manifest, Manifest), manifest
    if saves_state:
        write_state(store, update)
    publish(store, desk, update, incarnation=incarnation)
    desk.finish_update(update, {"reward": 0.5, "flat_group_share": 0.25, "kl": 1e-3})
    return manifest


def run_to_end(store: RunStore, desk: Coordinator, num_updates: int = 3) -> list[Manifest]:
    """A whole run."""
    publish(store, desk, 0)
    manifests = []
    for update in range(1, num_updates + 1):
        for _ in work(store, desk):
            pass
        manifests.append(learn(store, desk, update))
    for _ in work(store, desk):
        pass
    return manifests
