"""Weights & Biases: one run of theirs for a run of ours, resumed by its id; after a rewind another one of its group."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.sinks.packages import load
from deploy.sinks.settings import WandbSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class RunIdentity:
    """What a run is called elsewhere."""

    name: str
    key: str  # random, of the run's first start: the same at every resume, another one for every other run
    config: Mapping[str, Any]  # the resolved recipe; it holds no secrets


class WandbSink:
    """Scalars of updates have `update` as their axis, evaluations `evaluation/version`.

    wandb takes points of a run in rising order only and cannot void them, which is why a rewind opens a new run.

    Args:
        settings: project, mode, folder.
        identity: of the run.
        rewound_by: the start whose rewind opened the present run of theirs, 0 for none.
        directory: for wandb's own files.
    """

    def __init__(self, settings: WandbSettings, identity: RunIdentity, rewound_by: int, directory: Path) -> None:
        self._wandb: Any = load("wandb", "wandb")
        self._settings, self._identity, self._directory = settings, identity, directory
        self._open(rewound_by)

    def _open(self, rewound_by: int) -> None:
        suffix = f"-i{rewound_by}" if rewound_by else ""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._run: Any = self._wandb.init(
            project=self._settings.project, entity=self._settings.entity, mode=self._settings.mode, dir=str(self._directory),
            name=f"{self._identity.name}{suffix}", group=self._identity.name, id=f"{self._identity.key}{suffix}", resume="allow",
            config=dict(self._identity.config), allow_val_change=True, save_code=False,
            settings=self._wandb.Settings(console="off", disable_git=True, disable_code=True),
        )  # fmt: skip
        self._run.define_metric("update")
        self._run.define_metric("evaluation/version")
        self._run.define_metric("*", step_metric="update")
        self._run.define_metric("evaluation/*", step_metric="evaluation/version")

    def rewind(self, update: int, incarnation: int) -> int:
        """Go on in a new run of theirs, from the beginning."""
        self._run.finish()
        self._open(incarnation)
        return 1

    def log(self, update: int, time_unix: float, scalars: Mapping[str, float]) -> None:
        """Log one update."""
        self._run.log({**scalars, "update": update, "time_unix": time_unix})

    def log_evaluation(self, version: int, time_unix: float, scalars: Mapping[str, float]) -> None:
        """Log one evaluation."""
        self._run.log({**scalars, "evaluation/version": version})

    def flush(self) -> None:
        """Nothing: wandb sends from a process of its own."""

    def close(self) -> None:
        """Finish: waits for what is still on its way."""
        self._run.finish()
