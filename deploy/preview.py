"""`flowfleet preview`: groups as the rollouts would sample them, beside ODE samples, with the rewards' spread."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.policy.base import Policy
from common.policy.load import load_policy
from common.types import AdapterId, LeaseKind, Prompt, Publication, RolloutLease
from deploy.compose import resolved_model
from deploy.config import RunConfig
from deploy.gates import load_prompts, make_scorers
from deploy.report.preview import write_preview
from reward_servers.environments import release_scorers
from reward_servers.guarded import score_guarded
from rollout_workers.media import decode_media
from rollout_workers.sampler import evaluation_seed, sample_images
from rollout_workers.studio import Studio

Images = NDArray[np.uint8]


def preview(config: RunConfig, num_groups: int, out: Path) -> Path:
    """Draw `num_groups` groups of the training prompts with the base model, score them and write the page; return its path."""
    scorers = make_scorers(config)
    prompts = load_prompts(config, scorers).train
    policy = load_policy(resolved_model(config.model))
    studio = Studio(policy, config.rollout, config.evaluation, run=config.run.name, run_seed=config.run.seed)
    chosen = [prompts[index * len(prompts) // num_groups] for index in range(num_groups)]
    rollouts = np.stack([_rollouts(studio, policy, config, prompt, number) for number, prompt in enumerate(chosen)])
    plain = np.stack([_plain(policy, config, prompt) for prompt in chosen])
    tables = {}
    for scorer in scorers:
        rated = [
            score_guarded(scorer, images, [prompt] * len(images), len(images)) for images, prompt in zip(rollouts, chosen, strict=True)
        ]
        tables[scorer.name] = np.array([[np.nan if score.value is None else score.value for score in row] for row in rated])
    release_scorers(scorers)
    return write_preview(out, plain, rollouts, [prompt.text for prompt in chosen], tables, title=f"{config.run.name}: preview")


def _rollouts(studio: Studio, policy: Policy, config: RunConfig, prompt: Prompt, number: int) -> Images:
    """[K, H, W, 3], as a rollout worker samples."""
    nobody = Publication(adapter=AdapterId(incarnation=1, version=0, digest=""), path="", snapshots={})
    lease = RolloutLease(
        lease_id=f"p{number}", kind=LeaseKind.TRAIN, number=number, prompts=(prompt,), publication=nobody, snapshot=config.rollout.snapshot
    )
    return decode_media(policy, studio.sample(lease).final_latents, config.rollout.micro_batch).images


def _plain(policy: Policy, config: RunConfig, prompt: Prompt) -> Images:
    """[K, H, W, 3] by the ODE at the rollouts' number of steps."""
    rollout = config.rollout
    features = policy.encode([prompt.text], with_negative=rollout.guidance_scale > 1) * rollout.group_size
    seeds = [evaluation_seed(config.evaluation.seed, prompt.id, repeat) for repeat in range(rollout.group_size)]
    latents = sample_images(
        policy, features, seeds, num_steps=rollout.num_steps, guidance_scale=rollout.guidance_scale, micro_batch=rollout.micro_batch
    )
    return decode_media(policy, latents, rollout.micro_batch).images
