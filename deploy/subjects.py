"""What can be evaluated: a version of a run, an exported LoRA, a base model."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from common.errors import ConfigError
from common.policy.config import ModelConfig
from common.store.claim import newest_incarnation
from common.store.recovery import adapters
from common.store.run_store import RunStore
from deploy.compose import resolved_model
from deploy.config import RunConfig, load_config, resolve, shipped_path
from deploy.lora.files import LoraFile, is_lora, read_lora
from deploy.options import run_config_of

BASE: Final = "base"  # the --snapshot that is a run's base model
LORA_VERSION: Final = 1  # an exported LoRA has no version of its own; 0 is the base


class SubjectKind(StrEnum):
    """What was named."""

    RUN = "run"
    LORA = "lora"
    BASE = "base"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One thing to evaluate, with the configuration that draws and judges it."""

    kind: SubjectKind
    target: str  # as it was named
    config: RunConfig  # its model section is the subject's own
    version: int = 0  # of a run; 0 = the base
    path: str = ""  # of the published file inside the run
    lora: LoraFile | None = None
    run: RunStore | None = None  # the run directory, where finished evaluations may lie

    @property
    def name(self) -> str:
        """What a table calls it."""
        label = Path(self.target.rstrip("/")).name or self.target
        if self.kind is SubjectKind.RUN:
            return f"{label} v{self.version} {self.config.evaluation.snapshot}"
        return f"{label} (base)" if self.kind is SubjectKind.BASE else f"{label} (LoRA)"


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeOptions:
    """Who judges, under which protocol."""

    recipe: str | None = None  # default: the run's own configuration
    prompts: str | None = None
    snapshot: str | None = None
    sets: tuple[str, ...] = ()


def judging_config(target: str, recipe: str | None) -> RunConfig:
    """The configuration whose protocol and rewards judge. Raises ConfigError when neither a recipe nor a run names one."""
    if recipe is not None:
        return load_config(recipe, [])
    store = RunStore(target)
    if newest_incarnation(store) == 0:
        raise ConfigError(
            f"eval: {target} holds no run; a model or LoRA directory needs --recipe, whose base, protocol and rewards judge it; "
            "e.g. --recipe tiny-geneval"
        )
    return run_config_of(store)


def read_subject(target: str, judge: RunConfig, options: JudgeOptions, version: int | None = None) -> Subject:
    """Find out what a target is.

    Args:
        target: a run directory, an exported LoRA's directory, or a base model directory.
        judge: of `judging_config`: its protocol, rewards and image size, whatever the subject's own are.
        options: its sets and prompts are applied here.
        version: of a run; None = the newest.

    Raises:
        ConfigError: the target, its snapshot or version is not there.
        ModelError: a LoRA that does not bind to the base.
    """
    store = RunStore(target)
    if newest_incarnation(store) > 0:
        return _run_subject(store, judge, options, version)
    for name, value in (("snapshot", None if options.snapshot == BASE else options.snapshot), ("version", version)):
        if value is not None:
            raise ConfigError(f"eval: {target} is a model or LoRA directory, which has no {name} {value!r}; leave it out, or name a run")
    directory = shipped_path(target)
    if not is_lora(directory):
        return Subject(
            kind=SubjectKind.BASE, target=target, config=_config(judge, judge.model.model_copy(update={"path": target}), options)
        )
    config = _config(judge, judge.model, options)
    lora = read_lora(directory, shipped_path(config.model.path))
    model = config.model.model_copy(update={"lora": lora.config})
    return Subject(
        kind=SubjectKind.LORA, target=target, config=config.model_copy(update={"model": model}), version=LORA_VERSION, lora=lora
    )  # fmt: skip


def _run_subject(store: RunStore, judge: RunConfig, options: JudgeOptions, version: int | None) -> Subject:
    own = run_config_of(store).model
    keys = ("height", "width", *(("max_sequence_length",) if own.family == judge.model.family else ()))
    shared = {key: getattr(judge.model, key) for key in keys}  # how images are drawn is the protocol's; what a network is told is the run's
    config = _config(judge, own.model_copy(update=shared), options)
    if options.snapshot == BASE or version == 0:
        return Subject(kind=SubjectKind.BASE, target=store.url, config=config, run=store)
    published = adapters(store)
    if not published:
        raise ConfigError(f"eval: {store.url} has published no version yet; wait for the first, or pass --snapshot base")
    chosen = max(published) if version is None else version
    return Subject(
        kind=SubjectKind.RUN, target=store.url, config=config, version=chosen, path=published.get(chosen, ""), run=store
    )  # fmt: skip


def _config(judge: RunConfig, model: ModelConfig, options: JudgeOptions) -> RunConfig:
    sets = [*options.sets]
    if options.prompts:
        sets.append(f'prompts.test="{options.prompts}"')
    if options.snapshot not in (None, BASE):
        sets.append(f'evaluation.snapshot="{options.snapshot}"')
    tables = judge.model_copy(update={"model": model}).model_dump(mode="json", exclude_none=True)
    return resolve(tables, sets, "eval")


def is_same_base(one: Subject, other: Subject) -> bool:
    """Whether two subjects stand on the same base model: directory and dtype."""
    first, second = resolved_model(one.config.model), resolved_model(other.config.model)
    return (Path(first.path).resolve(), first.dtype) == (Path(second.path).resolve(), second.dtype)
