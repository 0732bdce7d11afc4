"""What a run will do, before it does it: roles, batch arithmetic, forwards, disk, balance (`train --dry-run`)."""

from dataclasses import dataclass

from deploy.config import RunConfig, run_facts

BYTES_PER_FLOAT = 4
WEBP_BYTES_PER_PIXEL = 1.1  # lossless, of small synthetic pictures and photographs alike: an upper estimate
LATENT_CHANNELS = 16
VAE_FACTOR = 8
TEXT_WIDTH = 4096  # of T5's features, which SD3 and FLUX condition on; pooled ones are small beside them
CLIP_TOKENS = 77  # before T5's in SD3; FLUX has none of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The arithmetic of one update."""

    images: int  # P * K
    minibatch_samples: int  # an optimizer step
    window: int  # W, stochastic steps kept
    sampling_forwards: float  # a sample, no-grad forwards
    learning_forwards: float  # a sample, trained or not, in units of one no-grad forward
    group_bytes: int
    update_bytes: int
    total_bytes: int

    @property
    def learner_per_rollout(self) -> float:
        """Learner devices that keep up with one rollout device of the same kind."""
        return self.learning_forwards / self.sampling_forwards


def make_plan(config: RunConfig) -> Plan:
    """Derive the plan from the configuration alone; starts nothing."""
    facts = run_facts(config)
    window = facts.window_size
    latent = LATENT_CHANNELS * (config.model.height // VAE_FACTOR) * (config.model.width // VAE_FACTOR)
    kept_latents = window + 1 if window else 0
    sample_bytes = latent * (kept_latents + 1) * BYTES_PER_FLOAT + int(config.model.height * config.model.width * WEBP_BYTES_PER_PIXEL)
    group_bytes = sample_bytes * config.rollout.group_size + _text_bytes(config)
    images = config.images_per_update
    return Plan(
        images=images,
        minibatch_samples=images // config.learner.optimizer_steps,
        window=window,
        sampling_forwards=config.rollout.num_steps * facts.guided,
        learning_forwards=config.learner.objective.forwards(facts)
        * config.learner.advantage.num_trained(facts.group_size)
        / facts.group_size,
        group_bytes=group_bytes,
        update_bytes=group_bytes * config.learner.groups_per_update,
        total_bytes=group_bytes * config.learner.groups_per_update * config.schedule.num_updates,
    )


def _text_bytes(config: RunConfig) -> int:
    """What a group keeps of its prompt, once for all samples: an upper estimate with T5; without T5 (the tiny models) too little to count."""
    if config.model.max_sequence_length == 0:
        return 0
    with_negative = config.rollout.guidance_scale > 1 or config.learner.objective.guides
    return (CLIP_TOKENS + config.model.max_sequence_length) * TEXT_WIDTH * BYTES_PER_FLOAT * (2 if with_negative else 1)


def describe(config: RunConfig, *, local: bool) -> list[str]:
    """The plan as lines: the same ones that a real run writes to its log."""
    plan = make_plan(config)
    servers = ", ".join(f"{r.name} x{r.num_servers} ({r.use}, weight {r.weight:g})" for r in config.reward)
    rollout, learner = config.rollout, config.learner
    told = {"embedded guidance": config.model.embedded_guidance, "grid shift": config.model.grid_shift}
    lines = [
        f"run {config.run.name}, seed {config.run.seed}: {config.schedule.num_updates} updates, max_staleness {config.schedule.max_staleness}",
        f"roles: {'one process (--local)' if local else 'Ray actors: coordinator, learner,'} rollout x{rollout.num_workers}, rewards {servers}",
        f"model: {config.model.family} at {config.model.path}, {config.model.dtype} on {config.model.device}, LoRA rank {config.model.lora.rank} alpha {config.model.lora.alpha}"
        + "".join(f", {words} {value:g}" for words, value in told.items() if value),
        f"sampling: {rollout.num_steps} steps of {rollout.kernel}, guidance {rollout.guidance_scale:g}, window {rollout.window.kind} (W={plan.window}), snapshot {rollout.snapshot}",
        f"batch: {learner.groups_per_update} groups x {rollout.group_size} samples = {plan.images} images an update, "
        f"{learner.optimizer_steps} optimizer steps of {plan.minibatch_samples} samples, micro-batches of {learner.micro_batch}",
        f"disk: {plan.update_bytes / 1e6:.1f} MB an update, {min(plan.total_bytes, config.store.max_bytes) / 1e9:.2f} GB kept at most (cap {config.store.max_bytes / 1e9:.1f} GB)",
        f"balance: sampling {plan.sampling_forwards:g} forwards an image, learning about {plan.learning_forwards:g}: "
        f"{plan.learner_per_rollout:.1f} learner devices keep up with one rollout device",
    ]
    excess = plan.learner_per_rollout * rollout.num_workers / learner.num_ranks
    if rollout.num_workers > 1 and excess > 1.5:
        takers = "one learner device takes" if learner.num_ranks == 1 else f"{learner.num_ranks} learner ranks take"
        lines.append(
            f"warning: {rollout.num_workers} rollout workers make images faster than {takers} them (by about {excess:.1f}x): more of them help "
            "little, more learner ranks would"
        )
    return [*lines, *(f"warning: {text}" for text in learner.objective.warnings(run_facts(config)))]


def disk_gate(config: RunConfig) -> str | None:
    """The reason why the disk cap cannot hold what recovery needs, or None."""
    plan = make_plan(config)
    needed = (config.learner.state_interval + config.schedule.max_staleness + 2) * plan.update_bytes
    if needed > config.store.max_bytes:
        return f"store.max_bytes={config.store.max_bytes} cannot hold (state interval + S + 2) updates = {needed} bytes; raise it or lower the group size"
    return None
