"""A studio that sleeps: groups of the recipe's own schema, their numbers drawn instead of sampled."""

import time
from collections.abc import Callable

import numpy as np

from common.flow.grid import timesteps_of
from common.policy.base import Policy
from common.seeding import derive_seed
from common.types import FloatArray, LeaseKind, Prompt, PromptFeatures, RolloutGroup, RolloutLease, SamplerSpec, Trajectory
from rollout_workers.config import RolloutConfig
from rollout_workers.delivery import SampledWork
from rollout_workers.studio import make_spec
from rollout_workers.windows import make_window_plan


class FakeStudio:
    """Spends `seconds` a lease; what it returns follows from (run seed, group, sample, policy version) and from nothing else."""

    def __init__(
        self, policy: Policy, config: RolloutConfig, *, run: str, run_seed: int, seconds: float, pause: Callable[[float], None] = time.sleep
    ) -> None:
        """policy: gives shapes and grid, no forward is run. pause: spends the seconds. Raises ConfigError for a window that does not fit."""
        self._policy, self._config, self._seconds, self._pause = policy, config, seconds, pause
        self._run, self._run_seed = run, run_seed
        self._plan = make_window_plan(config.window, config.num_steps, run_seed)

    def sample(self, lease: RolloutLease) -> SampledWork:
        """Return a group (TRAIN) or a sheet (EVAL), after the pause."""
        self._pause(self._seconds)
        if lease.kind is LeaseKind.TRAIN:
            return self._group(lease)
        seeds = [derive_seed(self._run_seed, "sheet", lease.number, row) for row in range(len(lease.prompts))]
        return SampledWork(
            lease=lease, group=None, final_latents=np.stack([self._draw(seed, 1)[0] for seed in seeds]), seconds=self._seconds
        )

    def _group(self, lease: RolloutLease) -> SampledWork:
        (prompt,), config = lease.prompts, self._config
        spec = make_spec(config, self._plan.steps(lease.window_round), lease.snapshot, self._policy.image_size)
        trajectories = tuple(self._trajectory(lease, spec, sample) for sample in range(config.group_size))
        group = RolloutGroup(
            run=self._run, number=lease.number, lease_id=lease.lease_id, prompt=prompt, adapter=lease.publication.adapter,
            sampler=spec, seconds=self._seconds, features=self._features(prompt), trajectories=trajectories,
        )  # fmt: skip
        final: FloatArray = np.stack([trajectory.final_latents for trajectory in trajectories])
        return SampledWork(lease=lease, group=group, final_latents=final, seconds=self._seconds)

    def _features(self, prompt: Prompt) -> PromptFeatures:
        (features,) = self._policy.encode([prompt.text], with_negative=self._config.guidance_scale > 1)
        return features

    def _trajectory(self, lease: RolloutLease, spec: SamplerSpec, sample: int) -> Trajectory:
        window = np.asarray(spec.window, dtype=np.int16)
        states = np.asarray(sorted({state for step in spec.window for state in (step, step + 1)}), dtype=np.int16)
        seed = derive_seed(self._run_seed, lease.number, sample)
        drawn = self._draw(derive_seed(seed, "version", lease.publication.adapter.version), len(states) + 1)
        grid = self._policy.sigmas(spec.num_steps)
        sigma = grid[window.astype(np.int64)]
        return Trajectory(
            sample_index=sample, seed=seed, step_index=window, timestep=timesteps_of(sigma).numpy(), sigma=sigma.numpy(),
            next_sigma=grid[window.astype(np.int64) + 1].numpy(), latents=drawn[1:], latent_index=states,
            behavior_log_prob=np.full(len(window), -1.0, dtype=np.float32), final_latents=drawn[0], media_row=sample,
        )  # fmt: skip

    def _draw(self, seed: int, count: int) -> FloatArray:
        """[count, C, h, w]."""
        return np.random.default_rng(seed).standard_normal((count, *self._policy.latent_shape), np.float32)
