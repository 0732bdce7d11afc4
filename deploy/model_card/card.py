"""The model card of an exported LoRA: README.md with the Hub's metadata, its pictures, and the configuration as TOML."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.store.run_store import RunStore
from deploy.config import RunConfig
from deploy.model_card.cost import POINT
from deploy.model_card.facts import CardFacts, CardRequest, read_facts
from deploy.model_card.loading import load_code
from deploy.model_card.markdown import NOT_RECORDED, block, code, known, plain, to_toml
from deploy.model_card.pictures import GRID
from deploy.report.bootstrap import METHOD
from deploy.report.verdict import duration, figure

CARD, CONFIG = "README.md", "config.toml"
TEMPLATES: Final = Path(__file__).parent / "templates"
_LIBRARIES: Final = {"peft": "peft", "diffusers": "diffusers"}
_TASK: Final = "text-to-image"
_SNAPSHOTS: Final = {
    "live": "the weights as the last optimizer step left them", "ema": "an exponential moving average of the trained weights",
    "behavior": "the slower average that sampled the training images",
}  # fmt: skip
_SETTINGS: Final = (
    "learner.objective", "learner.advantage", "learner.learning_rate", "learner.warmup_steps", "learner.decay_steps", "learner.weight_decay",
    "learner.max_grad_norm", "learner.ema_decay", "learner.groups_per_update", "learner.optimizer_steps", "rollout.group_size",
    "rollout.num_steps", "rollout.kernel", "rollout.noise_level", "rollout.guidance_scale", "rollout.snapshot", "rollout.window",
    "schedule.max_staleness", "model.family", "model.embedded_guidance", "model.grid_shift", "model.dtype", "model.height", "model.width", "model.lora.rank", "model.lora.alpha", "model.lora.targets",
)  # fmt: skip  # what decides how the run learns; the whole configuration stands at the card's end


def make_card(store: RunStore, config: RunConfig, request: CardRequest) -> dict[str, bytes]:
    """Return the files that stand beside the weights: README.md, config.toml, curves and samples.

    Args:
        store: the run, which is only read.
        config: of its newest start.
        request: the version, snapshot and format.

    Raises:
        CorruptFile: a file of the run breaks its form; the message names it.
        StoreError: the run cannot be read.
    """
    return card_files(read_facts(store, config, request))


def card_files(facts: CardFacts) -> dict[str, bytes]:
    """Return the files of a card by their paths beside the weights."""
    files = {CARD: render_card(facts).encode(), CONFIG: to_toml(facts.shown_config).encode()}
    files |= {curve.path: curve.content for curve in facts.curves}
    return files | ({GRID: facts.samples.content} if facts.samples else {})


def render_card(facts: CardFacts) -> str:
    """Return README.md: metadata, then Markdown in which nothing of the run is read as markup."""
    body = _environment().get_template("model_card.md.j2").render(
        facts=facts, request=facts.request, config=facts.config, cost=facts.cost, method=METHOD, grid=GRID, point=POINT,
        snapshot_meaning=_SNAPSHOTS.get(facts.request.snapshot, "a snapshot of the trained weights"),
        objective=_objective(facts.config), settings=_settings(facts.shown_config),
        load_code=load_code(facts.request.fmt, facts.config, facts.base, _prompt(facts)),
        config_json=json.dumps(facts.shown_config, indent=1, ensure_ascii=False, sort_keys=True),
        environment=facts.history.environment, commit=_commit(facts.history.environment),
        headline=[line for line in facts.lines if line.tuned.is_mean],
    )  # fmt: skip
    return f"---\n{card_metadata(facts).to_yaml()}\n---\n\n{body.strip()}\n"


def card_metadata(facts: CardFacts) -> ModelCardData:
    """Return the Hub's metadata; evaluation results stand in them only where the exported weights themselves were evaluated."""
    base, request = facts.base, facts.request
    tags = ["lora", "flowfleet", _TASK, "reinforcement-learning", facts.config.learner.objective.name, request.fmt]
    results = _results(facts)
    return ModelCardData(
        base_model=base.name, base_model_relation="adapter", library_name=_LIBRARIES.get(request.fmt), pipeline_tag=_TASK, tags=tags,
        license=base.license or "other", license_name=(base.license_name if base.license else "not-recorded") or None,
        license_link=base.license_link or None, model_name=facts.history.name if results else None, eval_results=results or None,
    )  # fmt: skip


def _results(facts: CardFacts) -> list[EvalResult]:
    """One result a task and reward, with the very numbers of the evaluation's result.json."""
    record = facts.evaluation
    if record is None or not facts.is_evaluated:
        return []
    return [
        EvalResult(
            task_type=_TASK, task_name="frozen evaluation", dataset_type="prompts", dataset_name=Path(facts.test_prompts.path).name,
            dataset_config=line.task, dataset_split="test", dataset_revision=str(record.protocol["prompts_digest"]),
            metric_type=line.tuned.reward, metric_name=f"{line.tuned.reward}, mean of {line.tuned.num_images} images",
            metric_value=line.tuned.mean,
        )
        for line in facts.lines
        if line.tuned.mean is not None
    ]  # fmt: skip


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=False, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "md": plain, "code": code, "block": block, "known": known, "figure": figure, "duration": duration,
        "signed": lambda value: f"{value:+.4f}", "number": lambda value: NOT_RECORDED if value is None else f"{value:.4f}",
    }  # fmt: skip
    return environment


def _prompt(facts: CardFacts) -> str:
    """The first evaluated prompt."""
    rows = facts.evaluation.rows if facts.evaluation else ()
    return rows[0].text if rows else "a red circle"


def _objective(config: RunConfig) -> str:
    """What the objective's own settings say of it, e.g. "DiffusionNFT (arXiv 2509.16117)"."""
    return (type(config.learner.objective).__doc__ or "").partition("\n")[0].removeprefix("Settings of ").rstrip(".")


def _settings(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The chosen keys of the configuration, nested ones in dots; a key that the run's configuration lacks is left out."""
    found: list[tuple[str, str]] = []
    for key in _SETTINGS:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        items = value.items() if isinstance(value, Mapping) else [("", value)]
        found += [(f"{key}.{name}".rstrip("."), _told(item)) for name, item in items if item is not None]
    return found


def _told(value: Any) -> str:
    return ", ".join(str(item) for item in value) if isinstance(value, list) else str(value)


def _commit(environment: Mapping[str, Any]) -> tuple[str, bool]:
    """The commit, "" where it is not recorded, and whether the tree had changes that no commit holds."""
    commit, mark, _ = str(environment.get("commit") or "").partition("+")
    return ("" if commit == "unknown" else commit), bool(mark)
