"""From a RunConfig to the settings and objects of every role: chosen once, here, for Ray and --local alike."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata

from common.config import config_digest
from common.policy.config import ModelConfig
from common.policy.published import read_publication
from common.store.coordinator import Coordinator, CoordinatorSettings
from common.store.evaluations import EvalProtocol, select_prompts
from common.store.ledger_entries import RewardSpec
from common.store.prompts_order import BalancedOrder, PromptOrder
from common.store.run_store import RunStore
from common.types import Prompt
from deploy.config import RunConfig, shipped_path
from deploy.fakes import FakeEngines
from deploy.gates import PromptSets
from learner.build import LearnerSettings
from reward_servers.build import ServerSettings
from reward_servers.config import RewardConfig
from rollout_workers.build import WorkerSettings

SETTLE_S = 6.0  # one heartbeat: after a restart, workers show what they still hold


@dataclass(frozen=True, slots=True, kw_only=True)
class RunParts:
    """Everything that the roles of one incarnation are made from."""

    config: RunConfig
    store_url: str
    incarnation: int
    train_prompts: tuple[Prompt, ...]
    coordinator: CoordinatorSettings
    learner: LearnerSettings
    workers: tuple[WorkerSettings, ...]
    servers: tuple[ServerSettings, ...]
    fakes: FakeEngines | None = None  # engines that sleep, where they stand for the recipe's


def compose(config: RunConfig, prompts: PromptSets, store_url: str, incarnation: int, fakes: FakeEngines | None = None) -> RunParts:
    """Derive every role's settings from the run's configuration; with `fakes` their engines sleep."""
    protocol = evaluation_protocol(config, prompts)
    model = resolved_model(config.model)
    snapshots = tuple(sorted({"live", config.rollout.snapshot, config.evaluation.snapshot}))
    return RunParts(
        config=config, store_url=store_url, incarnation=incarnation, train_prompts=prompts.train, fakes=fakes,
        coordinator=CoordinatorSettings(
            run=config.run.name, config_digest=config_digest(config), schedule=config.schedule, store=config.store,
            groups_per_update=config.learner.groups_per_update, group_size=config.rollout.group_size,
            rollout_snapshot=config.rollout.snapshot, rewards=reward_specs(config), protocol=protocol,
            state_interval=config.learner.state_interval, objective=config.learner.objective.name,
            software_version=metadata.version("flowfleet"),
        ),
        learner=LearnerSettings(
            store_url=store_url, run_seed=config.run.seed, incarnation=incarnation, model=model, learner=config.learner,
            weights={reward.name: reward.weight for reward in config.reward if reward.use == "train"}, snapshots=snapshots,
            fake=fakes.learner if fakes else None,
        ),
        workers=tuple(
            WorkerSettings(
                slot=f"rollout.{index}", store_url=store_url, run=config.run.name, run_seed=config.run.seed, model=model,
                rollout=config.rollout, evaluation=config.evaluation, keeps_negative=config.learner.objective.guides,
                fake=fakes.rollout if fakes else None,
            )
            for index in range(config.rollout.num_workers)
        ),
        servers=tuple(
            ServerSettings(
                slot=f"reward.{reward.name}.{index}", store_url=store_url, run=config.run.name, reward=reward,
                fake=fakes.reward if fakes else None,
            )
            for reward in config.reward
            for index in range(reward.num_servers)
        ),
    )  # fmt: skip


def evaluation_protocol(config: RunConfig, prompts: PromptSets) -> EvalProtocol:
    """The frozen evaluation of a run."""
    wanted = config.evaluation.rewards or tuple(reward.name for reward in config.reward)
    specs = tuple(spec for spec in reward_specs(config) if spec.name in wanted)
    return EvalProtocol(
        config=config.evaluation, prompts=select_prompts(prompts.test, config.evaluation.max_prompts), rewards=specs,
        max_sequence_length=config.model.max_sequence_length, embedded_guidance=config.model.embedded_guidance,
        grid_shift=config.model.grid_shift,
    )  # fmt: skip


def reward_specs(config: RunConfig) -> tuple[RewardSpec, ...]:
    """What the store needs to know of each reward."""
    return tuple(
        RewardSpec(
            name=reward.name, use=reward.use, tags=reward.tags, sample_every=reward.sample_every, breaker_limit_s=reward.breaker_limit_s
        )
        for reward in config.reward
    )


def server_gpus(config: RunConfig, reward: RewardConfig) -> float:
    """GPUs that a server of the reward reserves: its own num_gpus, else cluster.reward_gpus."""
    return config.cluster.reward_gpus if reward.num_gpus is None else reward.num_gpus


def resolved_model(model: ModelConfig) -> ModelConfig:
    """The model section with its path found from the project's root where it is a shipped one."""
    return model.model_copy(update={"path": str(shipped_path(model.path))})


def coordinator_builder(parts: RunParts, *, store_patience_s: float = 0.0) -> Callable[[], Coordinator]:
    """Return what makes the Coordinator, in whichever process calls it. `store_patience_s`: see RunStore; for a process with one thread."""

    def build() -> Coordinator:
        store = RunStore(parts.store_url, patience_s=store_patience_s)
        return Coordinator(
            store, parts.coordinator, incarnation=parts.incarnation,
            prompt_for=prompt_order(parts.config, parts.train_prompts),
            read_publication=lambda path: read_publication(store.read(path), path), settle_s=SETTLE_S, clock=time.monotonic,
        )  # fmt: skip

    return build


def prompt_order(config: RunConfig, prompts: Sequence[Prompt]) -> Callable[[int], Prompt]:
    """number -> Prompt, as the configuration orders them. Raises DataError for tag weights that fit no prompt."""
    if config.prompts.order == "balanced":
        return BalancedOrder(prompts, config.run.seed, config.prompts.tag_weights)
    return PromptOrder(prompts, config.run.seed)


def worker_settings(parts: RunParts, slot: str) -> WorkerSettings:
    """The settings of a worker that the configuration need not count: `flowfleet scale` adds some."""
    return replace(single_worker(parts), slot=slot)


def server_settings(parts: RunParts, slot: str) -> ServerSettings:
    """The same for a server of reward.NAME.<index>."""
    name = slot.partition(".")[2].rpartition(".")[0]
    known = {server.reward.name: server for server in parts.servers}
    if name in known:
        return replace(known[name], slot=slot)
    reward = next(reward for reward in parts.config.reward if reward.name == name)
    fake = parts.fakes.reward if parts.fakes else None
    return ServerSettings(slot=slot, store_url=parts.store_url, run=parts.config.run.name, reward=reward, fake=fake)


def single_worker(parts: RunParts) -> WorkerSettings:
    """The settings of the one worker of --local."""
    if parts.workers:
        return parts.workers[0]
    return WorkerSettings(
        slot="rollout.0", store_url=parts.store_url, run=parts.config.run.name, run_seed=parts.config.run.seed,
        model=parts.learner.model, rollout=parts.config.rollout, evaluation=parts.config.evaluation,
        keeps_negative=parts.config.learner.objective.guides, fake=parts.fakes.rollout if parts.fakes else None,
    )  # fmt: skip
