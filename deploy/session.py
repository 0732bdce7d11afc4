"""One start of a run: checks, claim, compose, drive, report. What `flowfleet train` and the demo share."""

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from common.config import config_digest
from common.errors import ConfigError
from common.store import paths
from common.store.claim import claim_run, newest_incarnation
from common.store.ending import Outcome
from common.store.manifests import read_claim
from common.store.run_store import RunStore
from deploy.compose import RunParts, compose
from deploy.config import RunConfig
from deploy.environment import encode_environment
from deploy.gates import check_config, check_fake_config, check_store
from deploy.live import LiveLine
from deploy.local_run import run_local
from deploy.options import StartOptions
from deploy.plan import describe
from deploy.ray_run import run_on_ray
from deploy.signals import StopSignals
from deploy.sinks.starter import following

SPEED_ONLY = ("cluster", "autoscale", "sinks", "store", "run.about", "rollout.num_workers", "evaluation.every", "evaluation.at_start", "schedule.num_updates",
              "schedule.time_limit_s", "schedule.lease_timeout_s", "schedule.group_timeout_s", "schedule.stall_timeout_s",
              "model.path", "prompts.train", "prompts.test", "learner.num_ranks", "learner.rank_timeout_s")  # fmt: skip
"""Keys that a resume may change freely: they change speed, length or place, not what an update computes."""

SERVING_ONLY = ("num_servers", "num_gpus", "max_groups", "deadline_s", "retries", "breaker_failures", "breaker_pause_s", "breaker_limit_s")
"""Keys of a reward that a resume may change freely: they change how it is served, not what it says of an image."""


def run_session(config: RunConfig, options: StartOptions, console: Console) -> Outcome:
    """Start or resume a run and see it through.

    Raises:
        FlowfleetError: with the exit code that the command ends with.
    """
    store = RunStore(options.run_dir)
    prompts = check_config(config) if options.fakes is None else check_fake_config(config)
    check_store(store)
    check_resume(store, config, options)
    incarnation = _claim(store, config, options, console)
    for line in describe(config, local=options.local):
        console.print(line, highlight=False, soft_wrap=True)
    if options.fakes is not None:
        console.print(options.fakes.describe(), highlight=False, soft_wrap=True)
    parts = compose(config, prompts, options.run_dir, incarnation, options.fakes)
    live = LiveLine(console=console, num_updates=config.schedule.num_updates, time_limit_s=config.schedule.time_limit_s)
    with following(config.sinks, options.run_dir), StopSignals(lambda text: console.print(text, highlight=False)) as signals, live:
        outcome = _drive(parts, options, live, signals)
    console.print(f"{outcome.kind}: {outcome.reason}", highlight=False)
    outcome.raise_if_failed()
    return outcome


def _drive(parts: RunParts, options: StartOptions, live: LiveLine, signals: StopSignals) -> Outcome:
    if options.local:
        return run_local(parts, live.update, signals=signals)
    return run_on_ray(parts, live.update, options.address, signals)


def _claim(store: RunStore, config: RunConfig, options: StartOptions, console: Console) -> int:
    claiming = claim_run(
        store, config.model_dump(mode="json"), config_digest=config_digest(config), environment=encode_environment().encode(),
        takeover=options.takeover,
    )  # fmt: skip
    while True:
        try:
            wait = next(claiming)
        except StopIteration as done:
            incarnation: int = done.value.incarnation
            return incarnation
        console.print(wait.reason, highlight=False)
        time.sleep(wait.seconds)


def check_resume(store: RunStore, config: RunConfig, options: StartOptions) -> None:
    """Refuse a resume that would silently train something else.

    Raises:
        ConfigError: the directory holds a run and --resume never was given, or a key changed that --allow-change does not name.
    """
    newest = newest_incarnation(store)
    if newest == 0 or not any(store.list(folder) for folder in (paths.MANIFESTS, paths.GROUPS, paths.LEARNER, paths.POLICY)):
        return  # no start made anything that a later one goes on from
    if not options.resume:
        raise ConfigError(f"train: {options.run_dir} holds a run already and --resume never was given; choose another --run-dir")
    before = flatten(dict(read_claim(store, newest).config))
    after = flatten(config.model_dump(mode="json"))
    servers = tuple(f"reward.{index}.{key}" for index in range(len(config.reward)) for key in SERVING_ONLY)
    allowed = (*SPEED_ONLY, *servers, *options.allow_changes)
    changed = [
        key for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not any(key == name or key.startswith(f"{name}.") for name in allowed)
    ]  # fmt: skip
    if changed:
        rows = "; ".join(f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in changed)
        raise ConfigError(
            f"train: {options.run_dir} was started with another config ({rows}); a resume trains what was begun; restore the values, choose "
            f"another --run-dir, or pass {' '.join(f'--allow-change {key}' for key in changed)}"
        )


def flatten(tables: Any, prefix: str = "") -> dict[str, Any]:
    """Nested tables and lists as dotted keys."""
    if isinstance(tables, dict):
        items: Sequence[tuple[str, Any]] = [(str(key), value) for key, value in tables.items()]
    elif isinstance(tables, list | tuple):
        items = [(str(index), value) for index, value in enumerate(tables)]
    else:
        return {prefix.removesuffix("."): tables}
    return {key: value for name, nested in items for key, value in flatten(nested, f"{prefix}{name}.").items()}
