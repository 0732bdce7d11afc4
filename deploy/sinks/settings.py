"""The recipe's [sinks]: where else a run's numbers go. They are copies: no key here changes what is trained, or stops a resume."""

from typing import Literal

from pydantic import Field

from common.config import StrictModel


class TensorboardSettings(StrictModel):
    """TensorBoard event files."""

    enabled: bool = False
    directory: str | None = None  # each run has a subfolder <run name>-<key> of it, so that runs may share it
    # None: reports/tensorboard of a local run; of a remote one the same subfolder of tensorboard/, where the driver runs


class WandbSettings(StrictModel):
    """Weights & Biases. The key comes from WANDB_API_KEY or `wandb login`, never from a recipe."""

    enabled: bool = False
    project: str = "flowfleet"
    entity: str | None = None  # None: the account's own
    mode: Literal["online", "offline"] = "online"  # offline: files for `wandb sync`
    directory: str | None = None  # where it keeps its files; None: reports/ of a local run, else the working directory


class SinksSection(StrictModel):
    """What follows the run. Durations are in seconds."""

    tensorboard: TensorboardSettings = TensorboardSettings()
    wandb: WandbSettings = WandbSettings()
    every_s: float = Field(5.0, gt=0)  # between looks at the run's files
    finish_timeout_s: float = Field(30.0, gt=0)  # after the run's end, for the last numbers; then the follower is ended

    @property
    def enabled(self) -> tuple[str, ...]:
        """The names of the sinks that are on."""
        return tuple(name for name, is_on in (("tensorboard", self.tensorboard.enabled), ("wandb", self.wandb.enabled)) if is_on)
