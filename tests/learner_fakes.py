"""Rollouts of any policy, their manifests, and an in-memory world around the learner."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import AlreadyExists, StoreError
from common.flow.kernels import make_kernel
from common.flow.noise import draw_noise, initial_noise
from common.policy.base import AdapterState, Policy
from common.types import (
    AdapterId,
    Manifest,
    ManifestGroup,
    Prompt,
    PromptFeatures,
    Publication,
    RolloutGroup,
    SamplerSpec,
    Stop,
    Trajectory,
    Wait,
)


def sampler_spec(kernel: str = "flow_sde", num_steps: int = 6, window: tuple[int, ...] = (0, 1), **changes: object) -> SamplerSpec:
    facts: dict[str, object] = {
        "kernel": kernel, "noise_level": 0.7, "num_steps": num_steps, "guidance_scale": 1.0, "height": 1, "width": 1, "snapshot": "live",
        "window": window, "shared_init": False,
    }  # fmt: skip
    return SamplerSpec(**(facts | changes))  # type: ignore[arg-type]


def sample_groups(
    policy: Policy, numbers: Sequence[int], group_size: int, spec: SamplerSpec, *, version: int = 0, run_seed: int = 0
) -> list[RolloutGroup]:
    """Sample whole groups under the loaded adapter, all in one forward a step."""
    pairs = [(number, sample) for number in numbers for sample in range(group_size)]
    shape = policy.latent_shape
    latents = torch.stack([initial_noise(run_seed, n, s, shape, shared=spec.shared_init) for n, s in pairs])
    grid, kernel, ode = policy.sigmas(spec.num_steps), make_kernel(spec.kernel, spec.noise_level), make_kernel("ode", 0.0)
    encoded = policy.encode(["a prompt"], with_negative=False)[0]
    batch = policy.batch_features([encoded] * len(pairs))
    kept: list[tuple[int, torch.Tensor, torch.Tensor]] = []  # step, latents before, log-prob
    states: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for step in range(spec.num_steps):
            sigma, following = grid[step].expand(len(pairs)), grid[step + 1].expand(len(pairs))
            stochastic = step in spec.window
            velocity = policy.velocity(latents, sigma, batch)
            transition = (kernel if stochastic else ode).transition(latents, velocity, sigma, following)
            noise = torch.stack([draw_noise(run_seed, n, s, "step", step=step, shape=shape) for n, s in pairs])  # the ODE does not use it
            before = latents
            latents = (kernel if stochastic else ode).draw(transition, noise).float()
            if stochastic:
                kept.append((step, before, kernel.log_prob(latents, transition)))
                states[step], states[step + 1] = before, latents
    rows = {number: [(row, sample) for row, (n, sample) in enumerate(pairs) if n == number] for number in numbers}
    common = {"grid": policy.sigmas(spec.num_steps), "kept": kept, "states": states, "final": latents}
    trajectories = {number: [_trajectory(row, sample, **common) for row, sample in rows[number]] for number in numbers}
    return [_group(number, version, spec, encoded, trajectories[number]) for number in numbers]


def _trajectory(
    row: int, sample: int, *, grid: torch.Tensor, kept: list[tuple[int, torch.Tensor, torch.Tensor]],
    states: Mapping[int, torch.Tensor], final: torch.Tensor,
) -> Trajectory:  # fmt: skip
    steps = [step for step, _, _ in kept]
    indices = sorted(states)
    shape = final.shape[1:]
    return Trajectory(
        sample_index=sample, seed=sample, step_index=np.array(steps, dtype=np.int16), timestep=(1000 * grid[steps]).numpy(),
        sigma=grid[steps].numpy(), next_sigma=grid[[step + 1 for step in steps]].numpy(),
        latents=np.stack([states[i][row].numpy() for i in indices]) if indices else np.zeros((0, *shape), dtype=np.float32),
        latent_index=np.array(indices, dtype=np.int16),
        behavior_log_prob=np.array([float(log_prob[row]) for _, _, log_prob in kept], dtype=np.float32),
        final_latents=final[row].numpy().astype(np.float32), media_row=sample,
    )  # fmt: skip


def _group(number: int, version: int, spec: SamplerSpec, encoded: PromptFeatures, trajectories: list[Trajectory]) -> RolloutGroup:
    return RolloutGroup(
        run="test", number=number, lease_id=f"l{number}", prompt=Prompt(id=f"p{number}", text=f"prompt {number}"),
        adapter=AdapterId(incarnation=1, version=version, digest=f"d{version}"), sampler=spec, seconds=0.0, features=encoded,
        trajectories=tuple(trajectories),
    )  # fmt: skip


def group_path(number: int) -> str:
    return f"groups/000/g{number:08d}.l{number}.group.arrow"


def manifest_of(
    update: int, groups: Sequence[RolloutGroup], scores: Sequence[Mapping[str, Sequence[float | None]]], **changes: object
) -> Manifest:
    """The manifest of sampled groups with raw scores a group; kept = scored by every reward that applies."""
    entries = []
    for group, table in zip(groups, scores, strict=True):
        kept = tuple(all(values[k] is not None for values in table.values()) for k in range(len(group.trajectories)))
        entries.append(
            ManifestGroup(
                number=group.number, path=group_path(group.number), media_path="", version=group.adapter.version, num_bytes=1,
                prompt_id=group.prompt.id, scores={name: tuple(values) for name, values in table.items()}, kept=kept,
            )
        )  # fmt: skip
    facts: dict[str, object] = {
        "update": update, "incarnation": 1, "config_digest": "c", "max_staleness": 1, "groups": tuple(entries), "drops": (),
    }  # fmt: skip
    return Manifest(**(facts | changes))  # type: ignore[arg-type]


def score_by_latents(groups: Sequence[RolloutGroup], reward: Callable[[NDArray[np.float32]], float]) -> list[dict[str, list[float | None]]]:
    return [{"r": [reward(t.final_latents.reshape(-1)) for t in group.trajectories]} for group in groups]


@dataclass
class MemoryFiles:
    """RunFiles in a dict, with the store's rule: equal bytes are accepted, others refused."""

    content: dict[str, bytes] = field(default_factory=dict)
    writers: list[str] = field(default_factory=list)

    def create_exclusive(self, path: str, content: bytes, *, writer_id: str) -> None:
        if self.content.setdefault(path, content) != content:
            raise AlreadyExists(f"MemoryFiles: {path} exists")
        self.writers.append(writer_id)

    def read(self, path: str) -> bytes:
        if path not in self.content:
            raise StoreError(f"MemoryFiles: {path} is missing")
        return self.content[path]

    def list(self, prefix: str = "") -> list[str]:
        return sorted(path for path in self.content if path.startswith(prefix))

    def remove(self, path: str) -> None:
        self.content.pop(path, None)


@dataclass
class RolloutWorld:
    """LearnerDesk and GroupSource at once: samples what the newest publication gives, scores it, hands out manifests."""

    policy: Policy
    group_size: int
    num_groups: int
    spec: SamplerSpec
    num_updates: int
    states: Callable[[Publication], AdapterState]
    publications: list[Publication] = field(default_factory=list)
    finished: list[tuple[int, Mapping[str, float]]] = field(default_factory=list)
    manifests: dict[int, Manifest] = field(default_factory=dict)
    groups: dict[str, RolloutGroup] = field(default_factory=dict)
    states_wanted_at: frozenset[int] = frozenset()  # updates whose end asks for a state
    waits: int = 0

    def next_manifest(self, update: int) -> Manifest | Wait | Stop:
        if update > self.num_updates:
            return Stop(reason="done")
        if update not in self.manifests:
            if all(publication.adapter.version < update - 1 for publication in self.publications):
                return Wait(seconds=0.0, reason="version")  # max_staleness 0; the learner's writer is at it
            if self.waits < update:  # one wait an update
                self.waits += 1
                return Wait(seconds=0.5, reason="groups")
            self._make(update)
        return self.manifests[update]

    def _make(self, update: int) -> None:
        newest = max(self.publications, key=lambda publication: publication.adapter.version)
        numbers = range((update - 1) * self.num_groups, update * self.num_groups)
        with self.policy.using(self.states(newest)):
            groups = sample_groups(self.policy, numbers, self.group_size, self.spec, version=newest.adapter.version)
        self.groups |= {group_path(group.number): group for group in groups}
        self.manifests[update] = manifest_of(update, groups, score_by_latents(groups, lambda x: float(x[0])))

    def publish(self, publication: Publication) -> None:
        self.publications.append(publication)

    def finish_update(self, update: int, metrics: Mapping[str, float]) -> bool:
        self.finished.append((update, metrics))
        return update in self.states_wanted_at

    def beat(self, slot: str, lease_ids: Sequence[str], metrics: Mapping[str, float]) -> None:
        pass

    def read_group(self, path: str) -> RolloutGroup:
        return self.groups[path]
