"""How a run is started, and what a run directory says of its configuration (light imports)."""

import json
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError
from common.store.claim import newest_incarnation
from common.store.manifests import read_claim
from common.store.run_store import RunStore
from deploy.config import RunConfig
from deploy.fakes import FakeEngines


@dataclass(frozen=True, slots=True, kw_only=True)
class StartOptions:
    """How a run is started."""

    run_dir: str
    local: bool = False
    resume: bool = True
    takeover: bool = False
    allow_changes: tuple[str, ...] = ()
    address: str | None = None
    fakes: FakeEngines | None = None  # engines that sleep, instead of the recipe's


def default_run_dir(config: RunConfig, fakes: FakeEngines | None = None) -> str:
    """runs/<name> of the working directory; runs/<name>-fake for fake engines."""
    return str(Path("runs") / (config.run.name if fakes is None else f"{config.run.name}-fake"))


def run_config_of(store: RunStore) -> RunConfig:
    """The configuration of a run's newest start. Raises ConfigError when the directory holds no run."""
    newest = newest_incarnation(store)
    if newest == 0:
        raise ConfigError(f"{store.url} holds no run (no config.i0001.json); name the --run-dir of a `flowfleet train`")
    return RunConfig.model_validate(json.loads(json.dumps(dict(read_claim(store, newest).config))))
