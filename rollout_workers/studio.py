"""From a lease to sampled work: a TRAIN lease's group, an EVAL lease's sheet, with text encoded once a prompt."""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from common.flow.kernels import make_kernel
from common.policy.base import Policy
from common.store.config import EvaluationConfig
from common.types import FloatArray, LeaseKind, PromptFeatures, RolloutGroup, RolloutLease, SamplerSpec
from rollout_workers.config import RolloutConfig
from rollout_workers.delivery import SampledWork
from rollout_workers.sampler import evaluation_seed, sample_group, sample_images
from rollout_workers.windows import check_window, make_window_plan


class FeatureCache:
    """Text features by (text, with negative), the least recently used leaving first."""

    def __init__(self, policy: Policy, capacity: int = 512) -> None:
        self._policy, self._capacity = policy, capacity
        self._kept: OrderedDict[tuple[str, bool], PromptFeatures] = OrderedDict()

    def encode(self, texts: Sequence[str], *, with_negative: bool) -> list[PromptFeatures]:
        """Return the features of each text, encoding only what is not kept."""
        missing = list(dict.fromkeys(text for text in texts if (text, with_negative) not in self._kept))
        found = dict(zip(missing, self._policy.encode(missing, with_negative=with_negative), strict=True)) if missing else {}
        found |= {text: self._kept[text, with_negative] for text in texts if text not in found}
        for text, features in found.items():
            self._kept[text, with_negative] = features
            self._kept.move_to_end((text, with_negative))
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
        return [found[text] for text in texts]


def make_spec(config: RolloutConfig, window: tuple[int, ...], snapshot: str, image_size: tuple[int, int]) -> SamplerSpec:
    """Return how a config samples groups with this window, snapshot and image size (H, W)."""
    height, width = image_size
    return SamplerSpec(
        kernel=config.kernel, noise_level=config.noise_level, num_steps=config.num_steps, guidance_scale=config.guidance_scale,
        height=height, width=width, snapshot=snapshot, window=window, shared_init=config.shared_init,
    )  # fmt: skip


class Studio:
    """Samples what a lease asks for, with the weights that the policy holds now."""

    def __init__(
        self, policy: Policy, config: RolloutConfig, evaluation: EvaluationConfig, *,
        run: str, run_seed: int, keeps_negative: bool = False, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """Prepare to sample; `keeps_negative`: for a learner that guides. Raises ConfigError when kernel, window and steps do not fit."""
        self._with_negative = keeps_negative or config.guidance_scale > 1
        self._policy, self._config, self._evaluation = policy, config, evaluation
        self._run, self._run_seed, self._clock = run, run_seed, clock
        self._plan = make_window_plan(config.window, config.num_steps, run_seed)
        check_window(self._plan, make_kernel(config.kernel, config.noise_level), config.num_steps)
        self._features = FeatureCache(policy)

    def sample(self, lease: RolloutLease) -> SampledWork:
        """Return a group (TRAIN) or a sheet (EVAL). Raises SamplingError."""
        return self._group(lease) if lease.kind is LeaseKind.TRAIN else self._sheet(lease)

    def spec(self, window_round: int, snapshot: str) -> SamplerSpec:
        """Return how the groups of a round are sampled."""
        return make_spec(self._config, self._plan.steps(window_round), snapshot, self._policy.image_size)

    def _group(self, lease: RolloutLease) -> SampledWork:
        started, (prompt,), config = self._clock(), lease.prompts, self._config
        spec = self.spec(lease.window_round, lease.snapshot)
        (features,) = self._features.encode([prompt.text], with_negative=self._with_negative)
        trajectories = sample_group(
            self._policy, features, spec,
            run_seed=self._run_seed, group=lease.number, group_size=config.group_size, micro_batch=config.micro_batch,
        )  # fmt: skip
        seconds = self._clock() - started
        group = RolloutGroup(
            run=self._run, number=lease.number, lease_id=lease.lease_id, prompt=prompt, adapter=lease.publication.adapter,
            sampler=spec, seconds=seconds, features=features, trajectories=trajectories,
        )  # fmt: skip
        final: FloatArray = np.stack([trajectory.final_latents for trajectory in trajectories])
        return SampledWork(lease=lease, group=group, final_latents=final, seconds=seconds)

    def _sheet(self, lease: RolloutLease) -> SampledWork:
        started, evaluation = self._clock(), self._evaluation
        features = self._features.encode([prompt.text for prompt in lease.prompts], with_negative=evaluation.guidance_scale > 1)
        final = sample_images(
            self._policy, features, self._sheet_seeds(lease),
            num_steps=evaluation.num_steps, guidance_scale=evaluation.guidance_scale, micro_batch=self._config.micro_batch,
        )  # fmt: skip
        return SampledWork(lease=lease, group=None, final_latents=final, seconds=self._clock() - started)

    def _sheet_seeds(self, lease: RolloutLease) -> list[int]:
        """Seeds by (prompt id, repeat): sheets are cut from a list that holds each prompt images_per_prompt times in a row."""
        first, repeats = lease.number * self._evaluation.sheet_size, self._evaluation.images_per_prompt
        return [evaluation_seed(self._evaluation.seed, prompt.id, (first + row) % repeats) for row, prompt in enumerate(lease.prompts)]
