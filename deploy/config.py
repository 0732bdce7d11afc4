"""The whole configuration of a run: one section a component, checked together before anything starts."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from common.config import StrictModel, apply_sets, parse
from common.errors import ConfigError
from common.metrics import LOOPBACK
from common.policy.config import ModelConfig
from common.store.config import EvaluationConfig, ScheduleConfig, StoreConfig
from deploy.autoscale import AutoscaleSection
from deploy.extends import read_extended
from deploy.sinks.settings import SinksSection
from learner.config import LearnerConfig
from learner.objectives.settings import BACKWARD_FORWARDS, RunFacts
from reward_servers.config import RewardConfig
from rollout_workers.config import RolloutConfig
from rollout_workers.windows import make_window_plan

RECIPES = Path(__file__).parent / "recipes"
PROJECT = Path(__file__).parent.parent
COMMON_SNAPSHOTS = ("live", "ema")  # those that every learner keeps


class RunSection(StrictModel):
    """What the run is called and where its randomness starts."""

    name: str
    seed: int = Field(0, ge=0)
    about: str = ""  # one line for `flowfleet recipes ls`


class PromptSection(StrictModel):
    """Prompt files: jsonl (id, text, metadata), GenEval's own lines, or txt."""

    train: str
    test: str
    order: Literal["shuffled", "balanced"] = "shuffled"  # balanced: the tags in turn, whatever their sizes
    tag_weights: dict[str, int] = Field(default_factory=dict)  # balanced: how often a cycle draws a tag; 1 where absent


class ClusterSection(StrictModel):
    """What Ray reserves; speed only, never the maths."""

    metrics_port: int = Field(0, ge=0, le=65535)  # of /metrics on the Coordinator; 0 = none; 9464 is the documented choice
    metrics_host: str = Field(LOOPBACK, min_length=1)  # another address, or 0.0.0.0, lets others read /metrics: it asks for no password
    rollout_gpus: float = Field(0.0, ge=0)  # a worker
    learner_gpus: float = Field(0.0, ge=0)
    reward_gpus: float = Field(0.0, ge=0)  # a server
    start_timeout_s: float = Field(300.0, gt=0)  # until every actor has answered once
    drain_timeout_s: float = Field(600.0, gt=0)  # until a drained actor has finished its group and left; after a stop, until all have
    grows: bool = False  # the cluster's own autoscaler adds nodes: what no node holds yet is waited for, not refused


class RunConfig(StrictModel):
    """A recipe, resolved."""

    run: RunSection
    model: ModelConfig
    prompts: PromptSection
    rollout: RolloutConfig
    reward: tuple[RewardConfig, ...] = Field(min_length=1)
    learner: LearnerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    store: StoreConfig = StoreConfig()
    cluster: ClusterSection = ClusterSection()
    autoscale: AutoscaleSection = AutoscaleSection()
    sinks: SinksSection = SinksSection()

    @property
    def images_per_update(self) -> int:
        """P * K."""
        return self.learner.groups_per_update * self.rollout.group_size

    @model_validator(mode="after")
    def _sections_agree(self) -> "RunConfig":
        problems = [*_arithmetic(self), *_rewards(self), *_sampler_and_objective(self), *_patience(self)]
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _arithmetic(config: RunConfig) -> list[str]:
    groups, steps = config.learner.groups_per_update, config.learner.optimizer_steps
    if groups % steps:
        return [
            f"learner.groups_per_update={groups} is not a multiple of learner.optimizer_steps={steps}; minibatches are whole groups: change one"
        ]
    subset, group_size = config.learner.advantage.subset, config.rollout.group_size
    if subset > group_size:
        return [
            f"learner.advantage.subset={subset} exceeds rollout.group_size={group_size}, of which it is a part; lower it, or leave it out"
        ]
    return []


def _patience(config: RunConfig) -> list[str]:
    start_s, stall_s = config.cluster.start_timeout_s, config.schedule.stall_timeout_s
    if config.cluster.grows and start_s > stall_s:
        return [
            f"cluster.start_timeout_s={start_s:g} waits for nodes that a growing cluster adds, and schedule.stall_timeout_s={stall_s:g} would end the "
            "run before; raise the latter above it"
        ]
    return []


def _rewards(config: RunConfig) -> list[str]:
    names = [reward.name for reward in config.reward]
    problems = [f"reward {name!r} stands twice; keep one" for name in sorted({n for n in names if names.count(n) > 1})]
    if not any(reward.use == "train" and reward.weight != 0 for reward in config.reward):
        problems.append('no reward trains; give one use = "train" and a weight that is not 0')
    problems += [
        f'evaluation.rewards names {name!r}, which no [[reward]] defines; add it with use = "watch"'
        for name in config.evaluation.rewards
        if name not in names
    ]
    return problems


def _sampler_and_objective(config: RunConfig) -> list[str]:
    try:
        facts = run_facts(config)
    except ConfigError as error:
        return [str(error)]
    return [*config.learner.objective.problems(facts), *_snapshots(config)]


def _snapshots(config: RunConfig) -> list[str]:
    objective = config.learner.objective
    kept = [*COMMON_SNAPSHOTS, *objective.make("behavior").needs.snapshots]
    return [
        f"{key}={name!r}, and objective {objective.name} keeps {', '.join(kept)}; name one of them"
        for key, name in (("rollout.snapshot", config.rollout.snapshot), ("evaluation.snapshot", config.evaluation.snapshot))
        if name not in kept
    ]


def run_facts(config: RunConfig) -> RunFacts:
    """What the objective must agree with.

    Raises:
        ConfigError: the window does not fit the steps.
    """
    rollout, learner, model = config.rollout, config.learner, config.model
    window = make_window_plan(rollout.window, rollout.num_steps, config.run.seed)
    exact = model.device == "cpu" and model.dtype == "float32"  # the same bits in any batch: stored log-probs serve as the anchor
    return RunFacts(
        kernel=rollout.kernel, noise_level=rollout.noise_level, num_steps=rollout.num_steps, window=window.reach,
        window_size=window.size, guidance_scale=rollout.guidance_scale, snapshot=rollout.snapshot, shared_init=rollout.shared_init,
        group_size=rollout.group_size, micro_batch=learner.micro_batch, optimizer_steps=learner.optimizer_steps,
        advantage=learner.advantage.kind, recomputes=learner.anchor == "recompute" or (learner.anchor == "auto" and not exact),
        quiet_end=model.family == "sd3" and model.grid_shift == 0,
        trained_forward=BACKWARD_FORWARDS + model.gradient_checkpointing,  # which makes the activations once more
    )  # fmt: skip


def recipe_path(name_or_file: str) -> Path:
    """Return the TOML file of a recipe name or path. Raises ConfigError naming the shipped recipes."""
    path = Path(name_or_file)
    if path.suffix == ".toml":
        return path
    shipped = RECIPES / f"{name_or_file}.toml"
    if not shipped.exists():
        names = ", ".join(recipe_names())
        raise ConfigError(f"recipe {name_or_file!r} is not shipped; choose one of {names}, or name a .toml file")
    return shipped


def recipe_names() -> list[str]:
    """The shipped run recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.toml") if not path.stem.startswith("pretrain"))


def read_recipe(name_or_file: str) -> dict[str, Any]:
    """Return the tables of a recipe or file, over those of the shipped recipes that it extends. Raises ConfigError."""
    return read_extended(recipe_path(name_or_file), recipe_path)


def resolve(tables: dict[str, Any], assignments: list[str], source: str) -> RunConfig:
    """Apply --set assignments and validate; relative paths of shipped files are found from the checkout."""
    return parse(RunConfig, apply_sets(tables, assignments), source)


def load_config(name_or_file: str, assignments: list[str]) -> RunConfig:
    """Return the resolved configuration of a recipe or file."""
    return resolve(read_recipe(name_or_file), assignments, str(recipe_path(name_or_file)))


def shipped_path(path: str) -> Path:
    """A path of the config as a file: as it stands, or from the project's root when it is not there."""
    given = Path(path)
    if given.is_absolute() or given.exists():
        return given
    return PROJECT / given
