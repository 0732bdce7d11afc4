"""Whole runs in seconds: the shipped recipes on the tiny random model, with a reward that needs no engine."""

import hashlib
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from common.policy.adapters import read_header
from common.store.recovery import adapters
from common.store.run_store import RunStore
from deploy.config import RunConfig, load_config
from deploy.options import StartOptions

QUIET = Console(quiet=True)

SMALL = (
    "model.lora.rank=4", "rollout.group_size=4", "rollout.micro_batch=4", "rollout.num_steps=4", "learner.groups_per_update=2",
    "learner.optimizer_steps=2", "learner.learning_rate=1e-3", "learner.warmup_steps=0", "learner.decay_steps=0",
    "learner.micro_batch=8", "schedule.num_updates=3", "evaluation.max_prompts=8", "evaluation.every=0", "evaluation.num_steps=2",
    "reward.0.name=jpeg_compressibility", "reward.1.name=jpeg_incompressibility", "reward.1.weight=1e-4",
    'evaluation.rewards=["jpeg_compressibility"]',
)  # fmt: skip
"""Both rewards train: a watch reward's scores may come too late for a manifest, and runs that should be bit-equal would differ in them."""


def small_config(model: Path, recipe: str, *sets: str) -> RunConfig:
    """A shipped recipe cut down to seconds."""
    return load_config(recipe, [*SMALL, f'model.path="{model}"', *sets])


def local_options(run_dir: Path, **changes: Any) -> StartOptions:
    """--local into a folder."""
    return StartOptions(run_dir=str(run_dir), local=True, **changes)


def published_digests(run_dir: Path) -> dict[int, str]:
    """Version -> digest of every adapter that is kept."""
    store = RunStore(str(run_dir))
    return {version: read_header(store.read(path), path)["digest"] for version, path in adapters(store).items()}


def manifest_facts(run_dir: Path) -> list[Any]:
    """What the manifests say, without the random lease ids and sizes in their paths."""
    facts = []
    for path in sorted((run_dir / "manifests").iterdir()):
        manifest = json.loads(path.read_text())
        groups = [{key: group[key] for key in ("number", "version", "prompt_id", "scores", "kept")} for group in manifest["groups"]]
        facts.append((manifest["update"], manifest["drops"], groups))
    return facts


def history_digests(run_dir: Path) -> list[str]:
    """sha256 of each update's history."""
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((run_dir / "history").iterdir())]
