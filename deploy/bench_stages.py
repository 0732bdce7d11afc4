"""The stages of the benchmark, each measured in a process of its own: `python -m deploy.bench_stages STAGE SETTINGS OUT`.

`prepare` fills a run directory with groups as a run would; every other stage reads its input from those files, so that a
process holds only what its role holds. Heavy imports stay inside the stages for the same reason.
"""

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import ConfigError, ScorerError
from common.prompts import read_prompts
from common.store import paths
from common.store.groups import read_group, read_media, write_group
from common.store.run_store import RunStore
from common.types import AdapterId, LeaseKind, Manifest, ManifestGroup, Prompt, Publication, RolloutGroup, RolloutLease
from deploy.config import RunConfig, load_config, shipped_path

LEASE = "bench"
NUM_GROUPS = 4  # of an update: 64 images at K = 16
RECIPES = {"nft": "tiny-geneval", "grpo": "tiny-geneval-grpo"}  # objective -> the recipe that trains with it
FIRST_NUMBER = {"nft": 0, "grpo": NUM_GROUPS, "text": 2 * NUM_GROUPS}  # of the prepared groups
TEXT_RECIPE = "tiny-ocr"  # whose prompts the OCR rewards judge
MEBIBYTE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """What every stage's process is told."""

    model: str  # a pipeline directory
    folder: str  # the run directory that `prepare` fills
    num_repeats: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One stage, ready to be timed."""

    num_images: int  # of one repeat
    run: Callable[[int], object]  # takes the repeat's number; 0 is the untimed one


def recipe(name: str, settings: BenchSettings) -> RunConfig:
    """Return a shipped recipe on the benchmark's model, with a smaller update."""
    return load_config(
        name, [f"model.path={json.dumps(settings.model)}", f"learner.groups_per_update={NUM_GROUPS}", "learner.optimizer_steps=2"]
    )


def prepare(settings: BenchSettings) -> None:
    """Commit NUM_GROUPS groups of each objective's sampling, and one group of a text prompt."""
    store = RunStore(settings.folder)
    for objective, name in RECIPES.items():
        config = recipe(name, settings)
        prompts = read_prompts(shipped_path(config.prompts.train))[:NUM_GROUPS]
        _commit_groups(store, config, prompts, FIRST_NUMBER[objective])
    prompts = read_prompts(shipped_path(load_config(TEXT_RECIPE, []).prompts.train))[:1]
    _commit_groups(store, recipe(RECIPES["nft"], settings), prompts, FIRST_NUMBER["text"])


def _commit_groups(store: RunStore, config: RunConfig, prompts: Sequence[Prompt], first: int) -> None:
    from common.policy.load import load_policy
    from rollout_workers.media import decode_media
    from rollout_workers.studio import Studio

    policy = load_policy(config.model)
    studio = Studio(
        policy, config.rollout, config.evaluation, run="bench", run_seed=config.run.seed, keeps_negative=config.learner.objective.guides
    )
    for offset, prompt in enumerate(prompts):
        work = studio.sample(_lease(prompt, first + offset, config.rollout.snapshot))
        assert work.group is not None, "a TRAIN lease gives a group"
        write_group(store, work.group, decode_media(policy, work.final_latents, config.rollout.micro_batch))


def sampling(settings: BenchSettings) -> Work:
    """K images of one prompt by the recipe's ODE steps; its text is encoded once, before."""
    from common.policy.load import load_policy
    from rollout_workers.studio import Studio

    config = recipe(RECIPES["nft"], settings)
    prompt = read_prompts(shipped_path(config.prompts.train))[0]
    studio = Studio(load_policy(config.model), config.rollout, config.evaluation, run="bench", run_seed=config.run.seed)
    return Work(num_images=config.rollout.group_size, run=lambda repeat: studio.sample(_lease(prompt, repeat, config.rollout.snapshot)))


def decoding(settings: BenchSettings) -> Work:
    """Latents of one group to images with their statistics."""
    from common.policy.load import load_policy
    from rollout_workers.media import decode_media

    config = recipe(RECIPES["nft"], settings)
    policy, group = load_policy(config.model), _groups(settings, "nft", 1)[0]
    latents = np.stack([row.final_latents for row in group.trajectories])
    return Work(num_images=len(latents), run=lambda repeat: decode_media(policy, latents, config.rollout.micro_batch))


def scoring(reward: str, settings: BenchSettings) -> Work:
    """One reward on the images of one group. Raises ConfigError when its engine is not installed."""
    from reward_servers.registry import make_scorer

    scorer = make_scorer(reward, {})
    number = FIRST_NUMBER["text" if reward.startswith("ocr") else "nft"]
    store = RunStore(settings.folder)
    group, media = read_group(store, paths.group_path(number, LEASE)), read_media(store, paths.media_path(number, LEASE))
    scorer.check_prompt(group.prompt)

    def score(repeat: int) -> None:
        failed = [found.error for found in scorer.score(media.images, [group.prompt] * len(media.images)) if found.value is None]
        if failed:
            raise ScorerError(
                f"benchmark: {reward} failed on {len(failed)} of {len(media.images)} images ({failed[0]}); mend its installation"
            )

    return Work(num_images=len(media.images), run=score)


def learning(objective: str, settings: BenchSettings) -> Work:
    """A whole update on NUM_GROUPS groups with made-up scores; the untimed first one also runs the start gates."""
    from common.policy.load import load_policy
    from learner.update import make_learner

    config, groups = recipe(RECIPES[objective], settings), _groups(settings, objective, NUM_GROUPS)
    policy = load_policy(config.model, with_vae=False, with_text=False)
    learner = make_learner(policy, config.learner, {LEASE: 1.0}, config.run.seed, base_dtype=config.model.dtype)
    num_images = sum(len(group.trajectories) for group in groups)
    return Work(num_images=num_images, run=lambda repeat: learner.update(_manifest(repeat + 1, groups), groups))


def committing(settings: BenchSettings) -> Work:
    """One group with its images, lossless WebP and fsync included, to the disk that holds the folder."""
    source, target = RunStore(settings.folder), RunStore(str(Path(settings.folder) / "committed"))
    number = FIRST_NUMBER["grpo"]
    group, media = read_group(source, paths.group_path(number, LEASE)), read_media(source, paths.media_path(number, LEASE))
    return Work(num_images=len(media.images), run=lambda repeat: write_group(target, dataclasses.replace(group, number=repeat), media))


def make_work(stage: str, settings: BenchSettings) -> Work:
    """Return a stage by its name: sampling, decoding, committing, scoring.REWARD, learning.OBJECTIVE. Raises ConfigError."""
    kind, _, detail = stage.partition(".")
    match kind, detail:
        case "scoring", reward if reward:
            return scoring(reward, settings)
        case "learning", objective if objective in RECIPES:
            return learning(objective, settings)
        case "sampling" | "decoding" | "committing", "":
            return {"sampling": sampling, "decoding": decoding, "committing": committing}[kind](settings)
    raise ConfigError(f"benchmark: stage {stage!r} is unknown; it is sampling, decoding, committing, scoring.REWARD or learning.OBJECTIVE")


def measure(stage: str, settings: BenchSettings) -> dict[str, object]:
    """Time a stage in this process: one untimed repeat, then num_repeats.

    Returns:
        num_images a repeat, seconds of each, and the process's peak memory; or why this reward cannot score here.
    """
    try:
        work = make_work(stage, settings)
    except ConfigError as error:
        if not stage.startswith("scoring."):
            raise
        return {"stage": stage, "skipped": str(error)}
    work.run(0)
    seconds = []
    for repeat in range(1, settings.num_repeats + 1):
        started = time.perf_counter()
        work.run(repeat)
        seconds.append(time.perf_counter() - started)
    return {"stage": stage, "num_images": work.num_images, "seconds": seconds, "peak_mib": peak_memory_bytes() / MEBIBYTE}


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far.

    Linux keeps it in /proc: getrusage's figure there may be the parent's, from before exec.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _groups(settings: BenchSettings, objective: str, count: int) -> list[RolloutGroup]:
    store, first = RunStore(settings.folder), FIRST_NUMBER[objective]
    return [read_group(store, paths.group_path(number, LEASE)) for number in range(first, first + count)]


def _lease(prompt: Prompt, number: int, snapshot: str) -> RolloutLease:
    fresh = Publication(adapter=AdapterId(incarnation=1, version=0, digest="fresh"), path="", snapshots={})
    return RolloutLease(lease_id=LEASE, kind=LeaseKind.TRAIN, number=number, prompts=(prompt,), publication=fresh, snapshot=snapshot)


def _manifest(update: int, groups: Sequence[RolloutGroup]) -> Manifest:
    draws = np.random.default_rng(update)
    entries = tuple(
        ManifestGroup(
            number=group.number, path=paths.group_path(group.number, LEASE), media_path=paths.media_path(group.number, LEASE), version=0,
            num_bytes=0, prompt_id=group.prompt.id, scores={LEASE: tuple(draws.random(len(group.trajectories)).tolist())},
            kept=(True,) * len(group.trajectories),
        )
        for group in groups
    )  # fmt: skip
    return Manifest(update=update, incarnation=1, config_digest=LEASE, max_staleness=0, groups=entries, drops=())


def main(arguments: Sequence[str]) -> None:
    """Run one stage on one thread and write what was measured as JSON."""
    stage, settings, out = arguments
    described = BenchSettings(**json.loads(settings))
    if stage.partition(".")[0] not in ("scoring", "committing"):
        import torch

        torch.set_num_threads(1)
    found: dict[str, object] = {}
    if stage == "prepare":
        prepare(described)
    else:
        found = measure(stage, described)
    Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
